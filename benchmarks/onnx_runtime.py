"""Times deformkit's library inside ONNX Runtime against what the runtime has itself, and against eager calls.

python benchmarks/onnx_runtime.py             every case, on one thread and on two
python benchmarks/onnx_runtime.py encoder     only cases with "encoder" in their name

All take turns in one process, with the same values. Outputs are compared with eager ones first.
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import half_of_digits
from deformkit._testing.cases import ROOMS
from deformkit._testing.timing import alternate
from deformkit.onnx import Form
from deformkit.ops._operator import operators

FORMS: dict[str, Form] = {
    "ours": "deformkit",
    "DeformConv": "standard",
    "GridSample": "gridsample",
    "gathers": "plain",
}
# The runtime's own operator of each, and the cases that are timed.
OWN = {"deform_conv": "DeformConv", "ms_deform_attn": "GridSample"}
CASES = {
    f"{name} {case.name}": (name, case)
    for name, chosen in (
        ("deform_conv", ("2d 64x128x128", "2d 256x56x84")),
        ("ms_deform_attn", ("2d encoder", "2d decoder")),
    )
    for case in ROOMS[name].BENCHMARKS
    if case.name in chosen
}


class Called(nn.Module):
    """An operator with its tensors as inputs; weights of a convolution are parameters."""

    def __init__(self, name: str, args: list[Any]) -> None:
        super().__init__()
        self.operator, self.args = operators[name], args
        fixed = ("weight", "bias") if name == "deform_conv" else ()
        self.places = [
            i for i in self.operator.tensors if args[i] is not None and operators[name].arguments[i] not in fixed
        ]

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(self.args[i] for i in self.places)

    def forward(self, *values: Tensor) -> Tensor:
        args = list(self.args)
        for place, value in zip(self.places, values, strict=True):
            args[place] = value
        return self.operator(*args)


def session(module: Called, form: str, threads: int) -> Callable[[], Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        dk.onnx.export(module, module.values, path, form=FORMS[form])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if form == "ours":
            options.register_custom_ops_library(dk.onnx.library())
        made = onnxruntime.InferenceSession(path, options)
    feeds = {node.name: value.numpy() for node, value in zip(made.get_inputs(), module.values, strict=True)}
    return partial(made.run, None, feeds)


def timed(name: str, threads: int, seconds: float) -> dict[str, float]:
    """Seconds per call of each, the median."""
    operator, case = CASES[name]
    module = Called(operator, operators[operator].ordered(case.arguments()))
    torch.set_num_threads(threads)
    expected = module(*module.values)
    calls: dict[str, Callable[[], Any]] = {"eager": partial(module, *module.values)}
    for form in ("ours", OWN[operator], "gathers"):
        call = session(module, form, threads)
        worst = (torch.from_numpy(call()[0]) - expected).abs().max() / expected.abs().max()
        if worst > half_of_digits(torch.float32):
            raise AssertionError(f"{name}, {form}: differs by {worst:.2g} of the largest value")
        calls[form] = call
    # The threads of a session spin for a while after it has run.
    return {form: timing.median for form, timing in alternate(calls, seconds, rest=0.1).items()}


def main(names: list[str], seconds: float) -> None:
    warnings.simplefilter("ignore")
    for name in CASES:
        if names and not any(each in name for each in names):
            continue
        for threads in (1, 2):
            with torch.no_grad():
                found = timed(name, threads, seconds)
            ratios = ", ".join(f"{form} {time / found['ours']:.2f}x" for form, time in found.items() if form != "ours")
            print(f"{name}, threads {threads}: ours {found['ours'] * 1e3:.2f} ms; {ratios}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="all, if none is given")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each of the calls")
    given = parser.parse_args()
    main(given.names, given.seconds)
