"""The command ``deformkit plan``."""

import json
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from .hardware import HARDWARE
from .models import MODELS, made
from .operators import Cost, traced
from .strategies import STRATEGIES, Plan, Setting, fits, planned

_DTYPES = ("float32", "bfloat16")
_LARGEST = 12


def plan(
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(MODELS)}; or FILE.py:FUNCTION or MODULE:FUNCTION.")
    ] = "deformable-detr",
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs, one process each.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step of one GPU.")] = 2,
    hardware: Annotated[str, typer.Option(help=f"Which GPUs: {', '.join(HARDWARE)}.")] = "h100",
    dtype: Annotated[str, typer.Option(help=f"Of the values: {', '.join(_DTYPES)}.")] = "bfloat16",
    max_offset: Annotated[
        float, typer.Option(min=0, help="How far offsets reach along the axis that is cut, in pixels.")
    ] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Predict what a training step costs on many GPUs: operations, bytes, collectives, memory and time by strategy.

    Nothing is run or measured. Operations and bytes are counted on tensors without values; the times follow from data
    sheets, and are the least that the hardware allows, without the latency of calls and of the network.

    A function FUNCTION(batch) returns a model and a tuple of inputs.
    """
    for option, value, known in (("--hardware", hardware, HARDWARE), ("--dtype", dtype, _DTYPES)):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)
    try:
        module, inputs = made(model, batch)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from None
    step = traced(module, inputs)
    setting = Setting(module, step, gpus, batch, dtype == "bfloat16", max_offset, HARDWARE[hardware])
    names = [name for name in STRATEGIES if fits(setting, name)]
    plans = [planned(setting, name) for name in names]
    if as_json:
        print(json.dumps(_document(setting, plans), indent=1))
    else:
        _show(setting, plans, model, dtype)


def _document(setting: Setting, plans: list[Plan]) -> dict[str, Any]:
    strategies = []
    for found in plans:
        entry = found._asdict()
        entry["collectives"] = [collective._asdict() for collective in found.collectives]
        strategies.append(entry)
    return {
        "predicted": True,
        "hardware": setting.hardware._asdict(),
        "parameters": setting.parameters(),
        "operators": {name: cost._asdict() for name, cost in setting.step.operators.items()},
        "strategies": strategies,
    }


def _show(setting: Setting, plans: list[Plan], model: str, dtype: str) -> None:
    console, hardware = Console(), setting.hardware
    console.print(
        f"[bold]{model}[/bold], {setting.parameters() / 1e6:.1f} million parameters, {setting.gpus} x "
        f"{hardware.title}, {dtype}, {setting.samples} samples for one GPU",
        highlight=False,
    )
    console.print(_operators(setting))
    if any(found.collectives for found in plans):
        console.print(_collectives(plans))
    console.print(_strategies(plans))
    console.print(
        "Predicted, not measured: the least time at the figures of the data sheets, without latency. "
        "ddp and fsdp overlap communication with computation, and have more samples the more GPUs there are.\n"
        f"Data sheets: {hardware.source}.",
        highlight=False,
    )


def _operators(setting: Setting) -> Table:
    # The operators of this package first, which have no namespace here.
    ranked = sorted(setting.step.operators.items(), key=lambda item: ("." in item[0], -item[1].bytes))
    rest = Cost()
    for _, cost in ranked[_LARGEST:]:
        rest = rest.plus(cost)
    rows = [*ranked[:_LARGEST], *([("others", rest)] if rest.calls else [])]
    right = [Column(head, justify="right") for head in ("calls", "operations", "bytes")]
    table = Table("operator", *right, box=SIMPLE, title="A step of one GPU, forward and backward", title_justify="left")
    for name, cost in rows:
        size = cost.bytes * setting.itemsize / setting.step.itemsize
        table.add_row(name, str(int(cost.calls)), _short(cost.matrix + cost.vector), _short(size, "B"))
    return table


def _collectives(plans: list[Plan]) -> Table:
    right = [Column(head, justify="right") for head in ("calls", "sent")]
    table = Table(
        "strategy", "collective", *right, box=SIMPLE, title="What a rank sends in a step", title_justify="left"
    )
    for found in plans:
        for one in found.collectives:
            table.add_row(found.strategy, one.kind, str(one.calls), _short(one.sent, "B"))
    return table


def _strategies(plans: list[Plan]) -> Table:
    heads = ("sent", "memory", "compute", "send", "step", "samples/s")
    right = [Column(head, justify="right") for head in heads]
    table = Table("strategy", *right, box=SIMPLE, title="A step of one rank, times in ms", title_justify="left")
    for found in plans:
        table.add_row(
            found.strategy,
            _short(sum(one.sent for one in found.collectives), "B"),
            _short(sum(found.memory.values()), "B"),
            *(f"{1e3 * seconds:.2f}" for seconds in (found.compute, found.communication, found.seconds)),
            f"{found.samples / found.seconds:.0f}",
        )
    return table


def _short(number: float, unit: str = "") -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()
