"""Deformable sampling at sizes where a kernel cuts its work, and where an index needs 64 bits."""

import pytest
import torch
from peak import Peak
from rooms import Call, check, check_bits

import deformkit as dk
from deformkit._testing import assert_equal
from deformkit.ops._operator import operators
from deformkit.ops.deform_sample.cases import Case

OPERATOR = operators["deform_sample"]

# Gradients that are cut into windows or added up run by run, whose points are in order or anywhere; fields laid out a
# part at a time, or so large that their rows are asked for before they are read.
LARGE = [
    Case("1d-in-place", 1, 1, (600_000,), (3000,), spread=3.0),
    Case("1d-windows", 1, 3, (100_000,), (20_000,), boundary="reflect"),
    Case("2d-windows", 1, 3, (300, 200), (100, 120), spread=2.0),
    Case("2d-windows-rows", 1, 17, (300, 200), (190, 190), boundary="reflect"),
    Case("2d-slices", 1, 150, (100, 70), (70, 60), groups=1, spread=1.0, boundary="border"),
    Case("2d-parts", 3, 72, (160, 150), (150, 90), groups=2),
    Case("2d-many-images", 19, 5, (9, 8), (11, 7), spread=1.0),
    Case("3d-windows", 1, 2, (40, 30, 50), (30, 30, 40), spread=1.0),
    Case("3d-windows-rows", 1, 16, (32, 30, 40), (30, 25, 40), boundary="border"),
    Case("3d-rows-in-order", 1, 17, (44, 60, 56), (44, 50, 40), spread=1.0),
    Case("3d-thin", 1, 2, (6, 90, 100), (6, 90, 80), spread=1.0),
    Case("3d-large-runs", 1, 1, (4, 560, 560), (4, 400, 400), spread=1.0, boundary="border"),
    Case("2d-few-anywhere", 2, 3, (120, 90), (120, 100)),
    Case("3d-nearest", 1, 16, (12, 30, 20), (10, 30, 20), mode="nearest", boundary="reflect", spread=9.0),
]
each_large = pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)


@each_large
def test_values_and_gradients(case: Case) -> None:
    call = Call(OPERATOR, case)
    check(call, call.arguments())


@pytest.mark.parametrize("name", ["2d-windows", "2d-slices", "2d-few-anywhere", "3d-thin"])
def test_sums_do_not_pass_through_a_half_dtype(name: str) -> None:
    call = Call(OPERATOR, next(case for case in LARGE if case.name == name))
    check(call, call.arguments(torch.bfloat16))


@each_large
def test_same_bits_at_any_number_of_threads_and_in_any_batch(case: Case) -> None:
    call = Call(OPERATOR, case)
    args = call.arguments()
    output = check_bits(call, args)
    if case.batch > 1:
        last = [v[-1:] if i in OPERATOR.batched else v for i, v in enumerate(args)]
        assert_equal(OPERATOR(*last), output[-1:])


@pytest.mark.parametrize("boundary", ["zeros", "border", "reflect"])
def test_samples_in_order_beside_one_that_is_not(boundary: str) -> None:
    """The gradient of a field of few channels is added up in another way where points lie in order."""
    call = Call(OPERATOR, Case("2d", 3, 3, (90, 110), (180, 170), boundary=boundary, spread=2.0))
    args = call.arguments()
    lists = args[1].flatten(2, -2)
    lists[1] = lists[1, :, torch.randperm(180 * 170, generator=torch.Generator().manual_seed(0))]
    lists[2, 0, ::1001, 0] = 2.0**40 if boundary == "border" else -3.25
    check(call, args)
    check_bits(call, args)
    backward = operators["deform_sample_backward"]
    output = OPERATOR(*args)
    together = backward(output, *args, [True, True])
    for b in range(3):
        alone = backward(output[b : b + 1], args[0][b : b + 1], args[1][b : b + 1], *args[2:], [True, True])
        for one, all_of_them in zip(alone, together, strict=True):
            assert_equal(one, all_of_them[b : b + 1], f"gradient of sample {b}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ["forwards", "backwards", "in turn", "gaps"])
def test_a_gradient_in_half_precision_is_rounded_once(order: str, dtype: torch.dtype) -> None:
    """Runs of points add to the rows of others; the rows are summed in single precision before they are written."""
    call = Call(OPERATOR, Case(order, 2, 3, (150, 110), (220, 170), spread=2.0))
    input, points, *rest = call.arguments(dtype)
    points = points.flatten(2, -2)
    if order == "backwards":
        points = points.flip(2)
    elif order == "in turn":
        points = points.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)
    elif order == "gaps":
        points[..., 0] = points[..., 0].where(points[..., 0] < 60, points[..., 0] + 40).where(points[..., 0] > 20, 30.0)
    points = points.contiguous()
    grad = torch.randn(2, 3, points.shape[2], generator=torch.Generator().manual_seed(0)).to(dtype)
    backward = operators["deform_sample_backward"]
    found = backward(grad, input, points, *rest, [True, True])
    expected = backward(grad.float(), input.float(), points, *rest, [True, True])
    assert_equal(found[0], expected[0].to(dtype), "gradient of input")
    assert_equal(found[1], expected[1], "gradient of points")
    check_bits(call, [input, points, *rest])


@pytest.mark.parametrize("name", ["1d-windows", "2d-parts"])
def test_the_gradient_of_the_input_does_not_read_it(name: str) -> None:
    """It is linear in the cotangent alone, as an operator that adds values to points needs it."""
    call = Call(OPERATOR, next(case for case in LARGE if case.name == name))
    input, *rest = call.arguments()
    output = OPERATOR(input, *rest)
    backward = operators["deform_sample_backward"]
    grads = [backward(output, field, *rest, [True, False])[0] for field in (input, torch.full_like(input, torch.nan))]
    assert_equal(*grads, "gradient of input")


@pytest.mark.huge
@pytest.mark.parametrize("size", [(2**31 + 64,), (2**16 + 64, 2**15), (2**11 + 64, 2**10, 2**10)], ids=str)
def test_more_than_2_to_the_31_elements(size: tuple[int, ...]) -> None:
    """All positions are one in memory: an index that overflows reads elsewhere, or is taken for outside."""
    axes = len(size)
    input = torch.full((1,) * (axes + 2), 1.5, dtype=torch.float16).expand(1, 1, *size)
    points = torch.zeros(1, 1, 4, axes)
    points[0, 0, :, 0] = torch.tensor([0.0, size[0] - 2.0**10, size[0] * 3.0, -1.0])
    points.requires_grad_()
    peak = Peak()
    for boundary, expected in {"zeros": [1.5, 1.5, 0, 0], "border": [1.5] * 4, "reflect": [1.5] * 4}.items():
        output = dk.deform_sample(input, points, boundary=boundary)
        assert output.flatten().tolist() == expected
        (by_points,) = torch.autograd.grad(output.sum(), points)
        assert by_points[0, 0, :, 0].tolist() == [0.0, 0.0, 0.0, 1.5 if boundary == "zeros" else 0.0]
    assert peak.so_far() < 300, "memory that grows with the field"


def test_workspace_does_not_grow_with_the_field() -> None:
    """The field is 256 MiB; what threads hold beside results is some windows and slices of it."""
    case = Case("2d", 1, 32, (1450, 1450), (1000, 1000), spread=1.0)
    named = case.arguments()
    peak = Peak()
    output = OPERATOR(*OPERATOR.ordered(named))
    backward = operators["deform_sample_backward"]
    grads = backward(output, *OPERATOR.ordered(named), [True, True])
    kept = sum(t.numel() * t.element_size() for t in (output, *grads)) // 2**20
    assert peak.so_far() - kept < 60
