"""``torch.jit.script`` and ``torch.jit.trace`` of the public functions."""

import pytest
import torch
from rooms import Call, public, representatives
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import evaluate
from deformkit.ops import _script
from deformkit.ops._shape import CHOICES
from deformkit.ops.deform_conv.cases import Case

CASE = Case("2d", 2, 4, (7, 8), 6, (3, 3), padding=1, offset_groups=2)
every_function = pytest.mark.parametrize("call", representatives(), ids=str)


@every_function
def test_script_is_the_function(call: Call) -> None:
    function, named = public(call)
    names = [name for name, value in named.items() if isinstance(value, Tensor)]
    rest = {name: value for name, value in named.items() if name not in names}
    scripted = torch.jit.script(function)
    positions = [
        i for i, name in enumerate(names) if name in {call.operator.arguments[i] for i in call.operator.differentiable}
    ]
    values = [named[name] for name in names]
    one, other = (
        evaluate(lambda *v, f=f: f(**dict(zip(names, v, strict=True)), **rest), values, positions, torch.float32)
        for f in (function, scripted)
    )
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours, theirs)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(CASE.arguments()["weight"].detach())

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return dk.deform_conv2d(input, offset, self.weight, None, (1, 1), 1, mask=mask, boundary="border")


def tensors() -> tuple[Tensor, ...]:
    named = CASE.arguments()
    return tuple(named[name].detach() for name in ("input", "offset", "mask"))


def test_a_scripted_layer_that_calls_one() -> None:
    layer = Layer()
    assert torch.equal(torch.jit.script(layer)(*tensors()), layer(*tensors()))


def test_defaults_and_numbers_for_lists() -> None:
    scripted, named = torch.jit.script(dk.deform_conv2d), CASE.arguments()
    args = (named["input"], named["offset"][..., :5, :6], named["weight"])
    assert torch.equal(scripted(*args), dk.deform_conv2d(*args))
    args = (named["input"], named["offset"], named["weight"])
    assert torch.equal(scripted(*args, padding=1), dk.deform_conv2d(*args, padding=1))
    assert torch.equal(scripted(*args, None, 1, 1), dk.deform_conv2d(*args, None, 1, 1))


@pytest.mark.parametrize("argument", CHOICES)
def test_names_have_the_same_codes_in_a_script(argument: str) -> None:
    code = torch.jit.script({"boundary": _script.boundary_code, "mode": _script.mode_code}[argument])
    assert [code(name) for name in CHOICES[argument]] == list(range(len(CHOICES[argument])))


def test_an_unknown_name_raises_in_a_script() -> None:
    named = {**CASE.arguments(), "boundary": "wrap"}
    with pytest.raises(torch.jit.Error, match="ValueError: boundary is 'wrap'"):
        torch.jit.script(dk.deform_conv2d)(**named)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace() -> None:
    layer = Layer()
    traced = torch.jit.trace(layer, tensors())
    other = tuple(value.flip(0) for value in tensors())
    assert torch.equal(traced(*other), layer(*other))
    assert "deformkit::deform_conv" in str(traced.inlined_graph)
