"""Layers whose kernels bend, grow or gate: snake, LDConv, D-LKA and DySample, against their formulas written out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deformkit as dk
from deformkit._testing import assert_close, evaluate

SIZE = (7, 6, 5)
SNAKES = {2: dk.nn.SnakeConv2d, 3: dk.nn.SnakeConv3d}
LINEAR = {1: dk.nn.LDConv1d, 2: dk.nn.LDConv2d, 3: dk.nn.LDConv3d}
GATES = {2: dk.nn.DeformLKA2d, 3: dk.nn.DeformLKA3d}


def moved(head: nn.Module) -> None:
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)


def grid(size: Any) -> Tensor:
    return torch.stack(torch.meshgrid(*[torch.arange(n).double() for n in size], indexing="ij"), -1)


def tap(input: Tensor, points: Tensor) -> Tensor:
    """``input [B, C, *S]`` at ``points [B, *out, N]``, clamped into the field: ``[B, C, *out]``."""
    samples = dk.reference.deform_sample(input, points.flatten(1, -2).unsqueeze(1), "border", "linear")
    return samples.unflatten(2, points.shape[1:-1])


def check_formula(layer: nn.Module, formula: Any, input: Tensor) -> None:
    parameters = list(layer.parameters())
    for name, one, truth in zip(
        ("output", "input"),
        evaluate(layer, [input], [0], torch.float64),
        evaluate(lambda x: formula(layer, x), [input], [0], torch.float64),
        strict=True,
    ):
        assert_close(one, truth, name=name)
    weights = torch.randn_like(layer(input))
    grads = [torch.autograd.grad((f(input) * weights).sum(), parameters) for f in (layer, lambda x: formula(layer, x))]
    for (name, _), one, truth in zip(layer.named_parameters(), *grads, strict=True):
        assert_close(one, truth, name=name)


def snake(layer: Any, input: Tensor) -> Tensor:
    axes, middle = input.dim() - 2, layer.kernel_size // 2
    step = layer.max_step * layer.offset_head(input).tanh()
    weight = layer.conv.weight.flatten(2)
    total = layer.conv.bias.reshape(-1, *[1] * axes)
    across = [n for n in range(axes) if n != layer.axis]
    for k in range(layer.kernel_size):
        point = grid(input.shape[2:]).repeat(len(input), *[1] * (axes + 1))
        shifts = [torch.zeros(()).double()] * axes
        shifts[layer.axis] = torch.tensor(k - middle).double()
        for place, n in enumerate(across):
            between = range(k, middle) if k < middle else range(middle + 1, k + 1)
            shifts[n] = sum((step[:, place * layer.kernel_size + j] for j in between), torch.zeros(()).double())
        shape = point.shape[:-1]
        point = point + torch.stack([shift.expand(shape) for shift in shifts], -1)
        total = total + torch.einsum("fc,bc...->bf...", weight[:, :, k], tap(input, point))
    return total


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("axis", [0, -1])
def test_snake_is_its_formula(axes: int, axis: int) -> None:
    layer = SNAKES[axes](3, 4, 5, axis).double()
    moved(layer.offset_head)
    check_formula(layer, snake, torch.randn(2, 3, *SIZE[:axes]).double())


@pytest.mark.parametrize("axes", [2, 3])
def test_a_new_snake_is_a_plain_line(axes: int) -> None:
    layer = SNAKES[axes](3, 4, 5, 0).double()
    input = torch.randn(2, 3, *SIZE[:axes]).double()
    padded = F.pad(input, [0, 0] * (axes - 1) + [2, 2], mode="replicate")
    plain = (F.conv2d, F.conv3d)[axes - 2](padded, layer.conv.weight, layer.conv.bias)
    assert_close(layer(input), plain)


def linear(layer: Any, input: Tensor) -> Tensor:
    axes = input.dim() - 2
    places = dk.nn.ld_conv.initial_taps(layer.num_taps, axes)
    offset = layer.offset_head(input).unflatten(1, (-1, axes)).movedim(2, -1)
    total = layer.conv.bias.reshape(-1, *[1] * axes)
    for n, place in enumerate(places):
        point = layer.stride * grid(offset.shape[2:-1]) + place + offset[:, n]
        weight = layer.conv.weight.flatten(2)[:, :, n]
        total = total + torch.einsum("fc,bc...->bf...", weight, tap(input, point))
    return total


@pytest.mark.parametrize("taps", [1, 4, 5, 11])
@pytest.mark.parametrize("stride", [1, 2])
def test_linear_deformable_convolution_is_its_formula(axes: int, taps: int, stride: int) -> None:
    layer = LINEAR[axes](3, 4, taps, stride).double()
    moved(layer.offset_head)
    input = torch.randn(2, 3, *SIZE[:axes]).double()
    assert layer(input).shape[2:] == tuple((n - 1) // stride + 1 for n in SIZE[:axes])
    check_formula(layer, linear, input)


def test_new_taps_lie_around_the_position() -> None:
    assert dk.nn.ld_conv.initial_taps(5, 2).tolist() == [[0, -1], [0, 0], [0, 1], [1, -1], [1, 0]]
    assert dk.nn.ld_conv.initial_taps(9, 2).tolist() == [[h, w] for h in (-1, 0, 1) for w in (-1, 0, 1)]
    assert dk.nn.ld_conv.initial_taps(4, 1).tolist() == [[-1], [0], [1], [2]]


@pytest.mark.parametrize("axes", [2, 3])
def test_new_gates_are_large_kernel_attention(axes: int) -> None:
    layer = GATES[axes](4, 3, 5, 2).double()
    input = torch.randn(2, 4, *SIZE[:axes]).double()
    conv = (F.conv2d, F.conv3d)[axes - 2]
    values = F.gelu(layer.input_proj(input))
    local = conv(values, layer.local.weight, layer.local.bias, padding=1, groups=4)
    distant = conv(local, layer.distant.weight, layer.distant.bias, padding=4, dilation=2, groups=4)
    assert_close(layer(input), input + layer.output_proj(values * layer.pointwise(distant)))


@pytest.mark.parametrize("scoped", [False, True])
def test_dysample_is_its_formula(scoped: bool) -> None:
    def formula(layer: Any, input: Tensor) -> Tensor:
        raw = layer.offset_head(input)
        offset = raw * layer.scope_head(input).sigmoid() / 2 if scoped else raw / 4
        output = []
        for group, channels in enumerate(input.chunk(2, 1)):
            rows = []
            for i in range(3):
                for j in range(3):
                    shift = torch.stack([offset[:, ((group * 2 + n) * 3 + i) * 3 + j] for n in (0, 1)], -1)
                    start = (torch.tensor([i, j]).double() + 0.5) / 3 - 0.5
                    rows.append(tap(channels, grid(input.shape[2:]) + start + shift))
            fine = torch.stack(rows, 2).unflatten(2, (3, 3)).permute(0, 1, 4, 2, 5, 3)
            output.append(fine.flatten(4, 5).flatten(2, 3))
        return torch.cat(output, 1)

    layer = dk.nn.DySample(4, scale=3, groups=2, scoped=scoped).double()
    moved(layer)
    check_formula(layer, formula, torch.randn(2, 4, 5, 6).double())


def test_dysample_of_an_empty_batch_has_a_gradient() -> None:
    layer, input = dk.nn.DySample(4), torch.randn(0, 4, 5, 6, requires_grad=True)
    layer(input).sum().backward()
    assert input.grad is not None and input.grad.shape == (0, 4, 5, 6)


def test_new_dysample_interpolates() -> None:
    layer, input = dk.nn.DySample(4).double(), torch.randn(1, 4, 5, 6).double()
    nn.init.zeros_(layer.offset_head.weight)
    assert_close(layer(input), F.interpolate(input, scale_factor=2, mode="bilinear", align_corners=False))


def test_arguments_that_are_wrong() -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: dk.nn.SnakeConv2d(2, 2, 4), "kernel_size is 4; it must be odd"),
        (lambda: dk.nn.SnakeConv2d(2, 2, axis=2), "axis is 2; it must be in -2 to 1"),
        (lambda: dk.nn.SnakeConv2d(2, 2)(torch.zeros(1, 3, 4, 4)), "input has shape .* 4 axes and 2 channels"),
        (lambda: dk.nn.LDConv2d(2, 2, 0), "num_taps is 0"),
        (lambda: dk.nn.LDConv1d(2, 2, 3)(torch.zeros(2, 5)), "input has shape .* 3 axes and 2 channels"),
        (lambda: dk.nn.DeformLKA2d(2, 4), "kernel_size is 4; it must be odd"),
        (lambda: dk.nn.DeformLKA2d(2)(torch.zeros(1, 2, 5)), "input has shape .* it must have 4 axes"),
        (lambda: dk.nn.DeformLKA3d(2)(torch.zeros(1, 3, 5, 5, 5)), "input has 3 channels; this layer has dim=2"),
        (lambda: dk.nn.DySample(6), "in_channels is 6; it must be divisible by groups, which is 4"),
        (lambda: dk.nn.DySample(4)(torch.zeros(1, 8, 3, 3)), "input has 8 channels; this layer has in_channels=4"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
