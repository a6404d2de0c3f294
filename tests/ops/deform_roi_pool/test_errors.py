"""Every wrong argument of deformable RoI pooling, and the message that it gets."""

import re
from typing import Any

import pytest
import torch
from rooms import needs_kernel
from torch import Tensor

import deformkit as dk
from deformkit.ops import _suspect
from deformkit.ops._operator import operators
from deformkit.ops.deform_roi_pool.cases import Case

CASE = Case("2d", 2, 8, (7, 9), 4, (3, 2))
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError)


def no(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def indices(*values: float) -> Tensor:
    rois = torch.tensor([[0.0, 1.0, 1.0, 4.0, 4.0]] * 4)
    rois[: len(values), 0] = torch.tensor(values)
    return rois


# the name of a test: the change of a valid call, the error, and its message
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"input": [1.0]}, TypeError, "input is a list; it must be a torch.Tensor"),
    "no rois": ({"rois": None}, TypeError, "rois is a NoneType; it must be a torch.Tensor"),
    "list of rois": ({"rois": [no(2, 4)]}, TypeError, "rois is a list; it must be a torch.Tensor"),
    "list of offsets": ({"offset": [0.0]}, TypeError, "offset is a list; it must be a torch.Tensor"),
    "integer input": (
        {"input": no(2, 8, 7, 9, dtype=torch.int32)},
        TypeError,
        "input has dtype torch.int32; it must be float16, bfloat16, float32 or float64",
    ),
    "complex input": ({"input": no(2, 8, 7, 9, dtype=torch.complex64)}, TypeError, "input has dtype torch.complex64; "),
    "8-bit input": ({"input": no(2, 8, 7, 9).to(torch.float8_e5m2)}, TypeError, "input has dtype torch.float8_e5m2; "),
    "half rois": (
        {"rois": no(4, 5, dtype=torch.float16)},
        TypeError,
        "rois has dtype torch.float16; with an input of torch.float32 it must be torch.float32: half precision "
        "cannot represent batch indices and corners accurately",
    ),
    "half rois beside a half input": (
        {"input": no(2, 8, 7, 9).bfloat16(), "rois": no(4, 5).bfloat16()},
        TypeError,
        "rois has dtype torch.bfloat16; with an input of torch.bfloat16 it must be torch.float32: ",
    ),
    "float64 rois": ({"rois": no(4, 5).double()}, TypeError, "rois has dtype torch.float64; with an input of torch"),
    "float32 rois beside float64": (
        {"input": no(2, 8, 7, 9).double(), "offset": None},
        TypeError,
        "rois has dtype torch.float32; with an input of torch.float64 it must be torch.float64",
    ),
    "integer rois": (
        {"rois": no(4, 5, dtype=torch.int64)},
        TypeError,
        "rois has dtype torch.int64; with an input of torch.float32 it must be torch.float32: convert it with "
        "rois.to(torch.float32)",
    ),
    "float64 offset": (
        {"offset": no(4, 2, 3, 2).double()},
        TypeError,
        "offset has dtype torch.float64; with an input of torch.float32 it must be torch.float32 or a half dtype",
    ),
    "float32 offset beside float64": (
        {"input": no(2, 8, 7, 9).double(), "rois": no(4, 5).double()},
        TypeError,
        "offset has dtype torch.float32; with an input of torch.float64 it must be torch.float64",
    ),
    "8-bit offset": ({"offset": no(4, 2, 3, 2).to(torch.float8_e5m2)}, TypeError, "offset has dtype torch.float8_e5m2"),
    "integer offset": ({"offset": no(4, 2, 3, 2, dtype=torch.int64)}, TypeError, "offset has dtype torch.int64; "),
    "rois elsewhere": ({"rois": no(4, 5, device="meta")}, ValueError, "rois is on meta; it must be on cpu, as input"),
    "offset elsewhere": (
        {"offset": no(4, 2, 3, 2, device="meta")},
        ValueError,
        "offset is on meta; it must be on cpu, as input is",
    ),
    "unbatched input": (
        {"input": no(8, 7)},
        ValueError,
        "input has shape [8, 7]; it needs a batch, channels and 1, 2 or 3 spatial axes",
    ),
    "four axes": ({"input": no(1, 1, 2, 2, 2, 2)}, ValueError, "input has shape [1, 1, 2, 2, 2, 2]; it needs"),
    "empty input": ({"input": no(2, 8, 0, 9)}, ValueError, "input has spatial size 0x9; every axis"),
    "rois of a sequence": (
        {"rois": no(4, 3)},
        ValueError,
        "rois has shape [4, 3]; with 2 spatial axes it must be [R, 5]: a batch index and 2 corners x 2 coordinates",
    ),
    "rois of four columns": ({"rois": no(4, 4)}, ValueError, "rois has shape [4, 4]; with 2 spatial axes"),
    "rois of a volume": ({"rois": no(4, 7)}, ValueError, "rois has shape [4, 7]; with 2 spatial axes"),
    "one roi": ({"rois": no(5)}, ValueError, "rois has shape [5]; with 2 spatial axes"),
    "rois by image": ({"rois": no(2, 2, 5)}, ValueError, "rois has shape [2, 2, 5]; with 2 spatial axes"),
    "offsets of other rois": (
        {"offset": no(3, 2, 3, 2)},
        ValueError,
        "offset has shape [3, 2, 3, 2]; it must be [4, 2, 3, 2]: 4 RoIs, 2 coordinates, 3x2 bins",
    ),
    "offsets of one coordinate": ({"offset": no(4, 1, 3, 2)}, ValueError, "offset has shape [4, 1, 3, 2]; it must be"),
    "offsets of other bins": ({"offset": no(4, 2, 2, 3)}, ValueError, "offset has shape [4, 2, 2, 3]; it must be"),
    "flat offsets": ({"offset": no(4, 12)}, ValueError, "offset has shape [4, 12]; it must be"),
    "no bins": ({"output_size": 0}, ValueError, "output_size is 0; each value must be at least 1"),
    "three sizes": ({"output_size": (3, 2, 1)}, ValueError, "output_size is (3, 2, 1); it needs 2 values"),
    "real size": ({"output_size": 3.0}, TypeError, "output_size is 3.0; it must be an int or a sequence of 2 ints"),
    "scale 0": ({"spatial_scale": 0.0}, ValueError, "spatial_scale is 0.0; it must be a finite number above 0"),
    "negative scale": ({"spatial_scale": -1}, ValueError, "spatial_scale is -1; it must be a finite number above 0"),
    "nan scale": ({"spatial_scale": float("nan")}, ValueError, "spatial_scale is nan; it must be a finite number"),
    "infinite scale": ({"spatial_scale": float("inf")}, ValueError, "spatial_scale is inf; it must be a finite"),
    "scale by name": ({"spatial_scale": "1/16"}, TypeError, "spatial_scale is '1/16'; it must be a finite number"),
    "negative ratio": ({"sampling_ratio": -1}, ValueError, "sampling_ratio is -1; it must be an int of at least 0"),
    "large ratio": ({"sampling_ratio": 1025}, ValueError, "sampling_ratio is 1025; it must be at most 1024"),
    "real ratio": ({"sampling_ratio": 2.0}, TypeError, "sampling_ratio is 2.0; it must be an int of at least 0"),
    "no ratio": ({"sampling_ratio": None}, TypeError, "sampling_ratio is None; it must be an int of at least 0"),
    "nan gamma": ({"gamma": float("nan")}, ValueError, "gamma is nan; it must be a finite number"),
    "infinite gamma": ({"gamma": -float("inf")}, ValueError, "gamma is -inf; it must be a finite number"),
    "no gamma": ({"gamma": None}, TypeError, "gamma is None; it must be a finite number"),
    "index too large": (
        {"rois": indices(1.0, 2.0, -1.0)},
        ValueError,
        "rois[1, 0] is 2; it must be a batch index, a whole number from 0 to 1, as input has batch size 2",
    ),
    "negative index": ({"rois": indices(0.0, 0.0, -1.0)}, ValueError, "rois[2, 0] is -1; it must be a batch index"),
    "fractional index": ({"rois": indices(0.5)}, ValueError, "rois[0, 0] is 0.5; it must be a batch index"),
    "nan index": ({"rois": indices(0.0, 0.0, 0.0, torch.nan)}, ValueError, "rois[3, 0] is nan; it must be a batch"),
    "infinite index": ({"rois": indices(torch.inf)}, ValueError, "rois[0, 0] is inf; it must be a batch index"),
    "many bins": (
        {"output_size": 2**16, "offset": None},
        ValueError,
        "output_size is 65536x65536; there must be at most 2147483648 bins",
    ),
    "huge index": ({"rois": indices(2.0**32)}, ValueError, "rois[0, 0] is 4.29497e+09; it must be a batch index"),
    "no image": (
        {"input": no(0, 8, 7, 9)},
        ValueError,
        "rois has shape [4, 5]; with an input of batch size 0 there can be no RoI",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    change, error, message = WRONG[name]
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        dk.deform_roi_pool(**{**CASE.arguments(), **change})


@needs_kernel("deform_roi_pool")
@pytest.mark.parametrize("name", WRONG)
def test_the_bare_operator_raises_an_error_too(name: str) -> None:
    """Wrong arguments of torch.ops.deformkit raise an error and never lead to an access out of bounds."""
    change, _, _ = WRONG[name]
    named = {**CASE.arguments(), **change}
    if isinstance(named["output_size"], int):
        named["output_size"] = [named["output_size"]] * 2
    args = [named[argument] for argument in operators["deform_roi_pool"].arguments]
    with pytest.raises(REFUSED):
        torch.ops.deformkit.deform_roi_pool(*args)
    if name.endswith("elsewhere"):  # nothing is computed for a tensor on meta
        return
    with pytest.raises(REFUSED):
        torch.ops.deformkit.deform_roi_pool_backward(torch.zeros(4, 8, 3, 2), *args, [True] * 2)


@needs_kernel("deform_roi_pool")
@pytest.mark.parametrize("grad", [no(4, 8, 3, 3), no(3, 8, 3, 2), no(4, 7, 3, 2), no(4), no(4, 8, 3, 2).double()])
def test_a_wrong_cotangent_raises(grad: Tensor) -> None:
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.deformkit.deform_roi_pool_backward(grad, *CASE.arguments().values(), [True] * 2)


@needs_kernel("deform_roi_pool")
@pytest.mark.parametrize("mask", [[], [True], [True] * 3])
def test_a_wrong_output_mask_raises(mask: list[bool]) -> None:
    with pytest.raises(RuntimeError, match="output_mask"):
        torch.ops.deformkit.deform_roi_pool_backward(torch.zeros(4, 8, 3, 2), *CASE.arguments().values(), mask)


@pytest.mark.parametrize("index", [2.0, -1.0, 0.5, torch.nan, torch.inf, -torch.inf, 2.0**31, 2.0**63, -(2.0**63)])
@pytest.mark.parametrize("ratio", [0, 2])
def test_a_batch_index_out_of_range_is_never_read(axes: int, index: float, ratio: int) -> None:
    """The operator and the reference refuse it if the public function cannot read the values."""
    case = Case("small", 2, 3, (5,) * axes, 3, (2,) * axes, sampling_ratio=ratio)
    args = list(case.arguments().values())
    args[1][1, 0] = index
    for function in (operators["deform_roi_pool"].overload, dk.reference.deform_roi_pool):
        with pytest.raises((RuntimeError, ValueError)):
            function(*args)
    with pytest.raises((RuntimeError, ValueError)):
        operators["deform_roi_pool_backward"].overload(torch.zeros(3, 3, *[2] * axes), *args, [True, True])
    torch.compiler.reset()
    compiled = torch.compile(lambda rois: dk.deform_roi_pool(args[0], rois, output_size=2), backend="aot_eager")
    with pytest.raises((RuntimeError, ValueError)):
        compiled(args[1])


def test_inverted_rois_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_suspect.looks_left, "rois", 9)
    named = CASE.arguments()
    boxes = torch.tensor([[0.0, 2.0, 1.0, 4.0, 3.0], [1.0, 6.0, 5.0, 2.0, 2.0], [0.0, 1.0, 5.0, 3.0, 2.0]])
    empty = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    infinite = torch.tensor([[0.0, torch.inf, 1.0, -torch.inf, 1.0]])
    for rois in (empty, infinite):
        dk.deform_roi_pool(named["input"], rois, output_size=2)
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            dk.deform_roi_pool(named["input"], boxes, output_size=2)
    (warning,) = caught
    assert str(warning.message).startswith(
        "2 of 3 RoIs are inverted, such as rois[1] with the corners (6, 5, 2, 2): the second corner must not be smaller"
    )
    assert warning.filename == __file__


def test_fake_tensors_are_checked_too() -> None:
    """Arguments that would fail at run time fail while a graph is traced."""
    named = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in CASE.arguments().items()}
    named["offset"] = no(4, 2, 2, 3, device="meta")
    with pytest.raises(ValueError, match=r"offset has shape \[4, 2, 2, 3\]"):
        operators["deform_roi_pool"](*named.values())


def test_sizes_in_every_form() -> None:
    named = {**CASE.arguments(), "output_size": (2, 2), "offset": None}
    expected = dk.deform_roi_pool(**named)
    for size in (2, [2], (2,), [2, 2], torch.Size([2, 2])):
        assert torch.equal(dk.deform_roi_pool(**{**named, "output_size": size}), expected)
    assert torch.equal(dk.deform_roi_pool(**{**named, "spatial_scale": 1}), expected)
