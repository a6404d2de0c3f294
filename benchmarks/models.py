"""Whole models of transformers, before and after ``deformkit.patch``."""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zoo import build, inputs

import deformkit
from deformkit._testing import half_of_digits
from deformkit.bench import PASSES, timed

HOST, OURS = "transformers", "deformkit"
SIZE, TINY = 384, 96


def rows(names: Sequence[str], seconds: float, tiny: bool = False) -> Iterator[dict[str, Any]]:
    """The two passes of each model; ``tiny`` has small images, few queries and one turn."""
    for name in names:
        few = {"num_queries": 20} if tiny and "former" not in name else {}
        host, arguments = build(name, **few), inputs(name, TINY if tiny else SIZE)
        patched = copy.deepcopy(host)
        done = deformkit.patch(patched)
        shared = _shared(done)
        for what in PASSES:
            run = _forward if what == PASSES[0] else _both
            calls = {HOST: _turn(run(host, arguments), shared, 0), OURS: _turn(run(patched, arguments), shared, 1)}
            expected, found = calls[HOST](), calls[OURS]()
            worst = max(_apart(found[key], value) for key, value in expected.items())
            notes: dict[str, Any] = {OURS: {"error": worst}}
            if not worst <= half_of_digits(torch.float32):
                notes[OURS]["skipped"] = f"wrong: error {worst:.2g}"
                del calls[OURS]
            about = {"operator": name, "case": name, "sizes": f"{arguments['pixel_values'].shape[-1]} pixels"}
            parts = sum(part.count for part in done.replaced)
            yield {
                **about,
                "pass": what,
                "parts": parts,
                "rivals": timed(calls, notes, seconds, least=1 if tiny else 5),
            }
        for module, attribute, pair in shared:
            setattr(module, attribute, pair[1])
        deformkit.unpatch(done)


Run = Callable[[], dict[str, Tensor]]
Shared = list[tuple[Any, str, tuple[Any, Any]]]


def _shared(done: Any) -> Shared:
    """The names that are replaced for every model: their module, and their values without and with the patch."""
    places = [part.shared.rpartition(".") for part in done.replaced if part.shared]
    modules = [(sys.modules[module], name) for module, _, name in places]
    ours = [getattr(*place) for place in modules]
    deformkit.unpatch(done)
    theirs = [getattr(*place) for place in modules]
    deformkit.patch(done.model)
    return [(*place, pair) for place, *pair in zip(modules, theirs, ours, strict=True)]


def _turn(run: Run, shared: Shared, side: int) -> Run:
    # If a function is replaced by name, one process cannot hold both sides, so each turn sets its own.
    def turn() -> dict[str, Tensor]:
        for module, name, pair in shared:
            setattr(module, name, pair[side])
        return run()

    return turn


def _forward(model: nn.Module, arguments: dict[str, Tensor]) -> Run:
    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            return _outputs(model, arguments)

    return run


def _both(model: nn.Module, arguments: dict[str, Tensor]) -> Run:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> dict[str, Tensor]:
        ends = [value for value in _outputs(model, arguments).values() if value.requires_grad]
        grads = torch.autograd.grad(sum(value.sum() for value in ends), parameters, allow_unused=True)
        return {"gradient": torch.cat([grad.flatten() for grad in grads if grad is not None])}

    return run


def _outputs(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point outputs, with 0 for entries masked by minus infinity."""
    named = model(**arguments).items()
    found = {name: value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: value.masked_fill(value.isinf(), 0) for name, value in found.items()}


def _apart(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()
