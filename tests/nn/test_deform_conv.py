"""The layers of deformable convolution are compared with torch.nn.ConvNd."""

import copy
import doctest
import inspect
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
import deformkit.nn.deform_conv as module
from deformkit._testing import assert_close, assert_equal

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
GIVEN = {1: dk.nn.DeformConv1d, 2: dk.nn.DeformConv2d, 3: dk.nn.DeformConv3d}
PACKED = {1: dk.nn.PackedDeformConv1d, 2: dk.nn.PackedDeformConv2d, 3: dk.nn.PackedDeformConv3d}
SIZE = (7, 6, 5)

WINDOWS = [
    {},
    {"padding": 1},
    {"padding": 2, "stride": 2},
    {"padding": "valid"},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 4, "padding": "same", "bias": False},
    {"kernel_size": 2, "padding": 1, "stride": 3},
    {"padding": 2, "dilation": 2, "groups": 2},
    {"padding": 1, "groups": 4},
]

# torch warns so about its own convolution.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def window_id(window: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in window.items()) or "default"


def arguments(axes: int, **options: Any) -> tuple[tuple[int, int, int], dict[str, Any]]:
    return (4, 8, options.pop("kernel_size", 3)), options


def image(axes: int, **options: Any) -> Tensor:
    return torch.randn(2, 4, *SIZE[:axes], **options)


def jitter(layer: nn.Module) -> None:
    """Give the offset head weights, so that it predicts something."""
    nn.init.normal_(layer.offset_head.weight, std=0.1)
    nn.init.normal_(layer.offset_head.bias, std=0.5)


def offsets(layer: nn.Module, like: Tensor, std: float = 0.0) -> Tensor:
    channels = layer.offset_groups * math.prod(layer.kernel_size) * layer.spatial_dims
    return std * like.new_empty(like.shape[0], channels, *like.shape[2:]).normal_()


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("window", WINDOWS, ids=window_id)
def test_zero_offsets_give_the_plain_convolution(axes: int, window: dict[str, Any], padding_mode: str) -> None:
    args, options = arguments(axes, **window, padding_mode=padding_mode, dtype=torch.float64)
    plain, layer = PLAIN[axes](*args, **options), GIVEN[axes](*args, **options, offset_groups=2)
    layer.load_state_dict(plain.state_dict(), strict=True)
    input = image(axes, dtype=torch.float64)
    expected = plain(input)
    zero = offsets(layer, expected)
    assert_close(layer(input, zero), expected)
    ones = torch.ones_like(zero[:, : zero.shape[1] // axes])
    assert_close(layer(input, zero, ones), expected)


@pytest.mark.parametrize("window", WINDOWS, ids=window_id)
def test_border_at_zero_offsets_is_replicate_padding(axes: int, window: dict[str, Any]) -> None:
    args, options = arguments(axes, **window, dtype=torch.float64)
    plain = PLAIN[axes](*args, **options, padding_mode="replicate")
    layer = GIVEN[axes](*args, **options, boundary="border")
    layer.load_state_dict(plain.state_dict())
    input = image(axes, dtype=torch.float64)
    expected = plain(input)
    assert_close(layer(input, offsets(layer, expected)), expected)


@pytest.mark.parametrize("boundary", ["zeros", "border"])
def test_same_with_an_even_kernel_only_adds_positions(axes: int, boundary: str) -> None:
    """An additional row at the end that continues the boundary rule changes nothing, wherever the points are."""
    layer = GIVEN[axes](4, 8, 4, padding="same", boundary=boundary, dtype=torch.float64)
    input = image(axes, dtype=torch.float64)
    offset = offsets(layer, input, std=4.0).requires_grad_()
    output = layer(input, offset)
    assert output.shape[2:] == input.shape[2:]

    inner = tuple(slice(0, n - 1) for n in input.shape[2:])
    function = getattr(dk, f"deform_conv{axes}d")
    direct = function(input, offset[(..., *inner)], layer.weight, layer.bias, padding=1, boundary=boundary)
    assert_close(output[(..., *inner)], direct)
    [of_layer] = torch.autograd.grad(output[(..., *inner)].square().sum(), offset)
    [of_operator] = torch.autograd.grad(direct.square().sum(), offset)
    assert_close(of_layer, of_operator)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_points_move_over_the_padded_input(axes: int, padding_mode: str) -> None:
    layer = GIVEN[axes](4, 8, 3, padding=1, padding_mode=padding_mode, dtype=torch.float64)
    input = image(axes, dtype=torch.float64)
    padded = nn.functional.pad(input, [1] * 2 * axes, mode=padding_mode)
    offset = offsets(layer, input, std=2.0)
    function = getattr(dk, f"deform_conv{axes}d")
    assert_close(layer(input, offset), function(padded, offset, layer.weight, layer.bias))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=window_id)
def test_a_new_packed_layer_is_the_plain_convolution(axes: int, window: dict[str, Any], modulated: bool) -> None:
    args, options = arguments(axes, **window)
    torch.manual_seed(3)
    plain = PLAIN[axes](*args, **options)
    after = torch.rand(())
    torch.manual_seed(3)
    layer = PACKED[axes](*args, **options, modulated=modulated, offset_groups=2)
    assert_equal(torch.rand(()), after, "random stream after the layer")
    assert_equal(layer.weight, plain.weight)
    input = image(axes)
    assert_close(layer(input), plain.double()(input.double()))


def test_packed_layer_loads_a_plain_state_dict(axes: int) -> None:
    plain, layer = PLAIN[axes](4, 8, 3), PACKED[axes](4, 8, 3, modulated=True)
    result = layer.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys == ["offset_head.weight", "offset_head.bias"] and not result.unexpected_keys
    assert_equal(layer.weight, plain.weight)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_packed_is_the_given_layer_at_its_prediction(axes: int, padding_mode: str) -> None:
    options = {"stride": 2, "padding": 1, "groups": 2, "offset_groups": 2, "padding_mode": padding_mode}
    layer, given = PACKED[axes](4, 8, 3, modulated=True, **options), GIVEN[axes](4, 8, 3, **options)
    jitter(layer)
    given.load_state_dict(layer.state_dict(), strict=False)
    input = image(axes)
    offset, mask = layer.predict(input)
    assert mask is not None and mask.min() > 0 and mask.max() < 2 and mask.std() > 0
    assert offset.shape[1] == 2 * 3**axes * axes and mask.shape[1] == 2 * 3**axes
    assert_equal(layer(input), given(input, offset, mask))
    assert PACKED[axes](4, 8, 3).predict(input)[1] is None


def test_the_head_learns(axes: int) -> None:
    """The layer is padded and zero-initialised: its points start on grid lines and partly outside."""
    layer = PACKED[axes](4, 8, 3, padding=1, modulated=True)
    input = image(axes)
    for step in range(2):
        layer.zero_grad()
        (layer(input) - 1).square().mean().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (name, step)
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    rows = layer.offset_head.weight.flatten(1).abs().sum(1)
    assert (rows > 0).all(), "every offset and every mask is learnt"


def test_an_offset_outside_has_a_gradient(axes: int) -> None:
    """The first tap of the first position is at -1, where the derivative is the right-hand one."""
    line = [0] * (axes - 1)
    layer = GIVEN[axes](4, 8, (3, 1, 1)[:axes], padding=(1, *line))
    offset = offsets(layer, image(axes)).requires_grad_()
    layer(image(axes), offset).square().sum().backward()
    assert offset.grad is not None and offset.grad[(slice(None), 0, 0, *line)].abs().min() > 0


def test_sampling_locations(axes: int) -> None:
    layer = PACKED[axes](4, 8, (3, 2, 3)[:axes], stride=2, padding=1, dilation=2, offset_groups=2)
    jitter(layer)
    offset = layer.predict(image(axes))[0].detach()
    points = layer.sampling_locations(offset)
    taps, size = math.prod(layer.kernel_size), offset.shape[2:]
    assert points.shape == (2, 2, taps, *size, axes)
    assert_equal(layer.sampling_locations(offset[0]), points[0])
    assert points.dtype == layer.sampling_locations(offset.bfloat16()).dtype == torch.float32

    batch, group, tap = 1, 1, taps - 1
    position = tuple(n - 1 for n in size)
    for axis in range(axes):
        shift = offset[(batch, (group * taps + tap) * axes + axis, *position)]
        expected = 2 * position[axis] - 1 + 2 * (layer.kernel_size[axis] - 1) + shift
        assert points[(batch, group, tap, *position, axis)] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_sampling_locations_are_where_the_layer_reads(axes: int, padding_mode: str) -> None:
    """If the input holds its own coordinates, a layer that selects one tap returns the position of that tap."""
    layer = GIVEN[axes](1, 1, 2, padding="same", padding_mode=padding_mode, bias=False, dtype=torch.float64)
    size = SIZE[:axes]
    offset = offsets(layer, torch.zeros(1, 1, *size, dtype=torch.float64)).uniform_(-0.9, -0.1)
    points = layer.sampling_locations(offset)
    inner = tuple(slice(1, n - 1) for n in size)
    for tap in range(2**axes):
        with torch.no_grad():
            layer.weight.zero_().flatten()[tap] = 1
        for axis in range(axes):
            shape = [1, 1, *(size[axis] if i == axis else 1 for i in range(axes))]
            ramp = torch.arange(size[axis], dtype=torch.float64).reshape(shape).expand(1, 1, *size)
            assert_close(layer(ramp, offset)[(0, 0, *inner)], points[(0, 0, tap, *inner, axis)])


def test_unbatched(axes: int) -> None:
    layer, given = PACKED[axes](4, 8, 3, padding=1, modulated=True), GIVEN[axes](4, 8, 3, padding=1)
    jitter(layer)
    input = image(axes)
    offset, mask = layer.predict(input)
    assert_equal(layer(input[0]), layer(input[:1])[0])
    assert_equal(given(input[0], offset[0], mask[0]), given(input[:1], offset[:1], mask[:1])[0])


def test_empty_batch(axes: int) -> None:
    layer = PACKED[axes](4, 8, 2, padding="same", padding_mode="replicate", modulated=True)
    output = layer(image(axes)[:0])
    assert output.shape == (0, 8, *SIZE[:axes])
    output.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().max() == 0


def test_copies(axes: int) -> None:
    layer = PACKED[axes](4, 8, 3, padding=1, offset_groups=2, boundary="border", modulated=True)
    jitter(layer)
    input = image(axes)
    expected = layer(input)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    restored = PACKED[axes](4, 8, 3, padding=1, offset_groups=2, boundary="border", modulated=True)
    restored.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), restored):
        assert_equal(other(input), expected)
        assert repr(other) == repr(layer)


def test_repr_shows_arguments_that_are_not_defaults() -> None:
    assert repr(dk.nn.DeformConv2d(4, 8, 3)) == "DeformConv2d(4, 8, kernel_size=(3, 3), stride=(1, 1))"
    layer = dk.nn.PackedDeformConv1d(4, 8, 3, 1, "same", bias=False, modulated=True, offset_groups=2, boundary="border")
    for part in ("padding=same", "bias=False", "offset_groups=2", "boundary=border", "modulated=True", "(offset_head)"):
        assert part in repr(layer)


def test_reset_parameters(axes: int) -> None:
    layer = PACKED[axes](4, 8, 3)
    jitter(layer)
    weight = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, weight)
    assert layer.offset_head.weight.abs().max() == 0 == layer.offset_head.bias.abs().max()


def test_device_and_dtype(axes: int, dtype: torch.dtype) -> None:
    layer = PACKED[axes](4, 8, 3, padding=1, modulated=True, device="meta", dtype=dtype)
    assert {p.device.type for p in layer.parameters()} == {"meta"} and {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(image(axes, device="meta", dtype=dtype)).shape == (2, 8, *SIZE[:axes])
    with torch.device("meta"):
        assert PACKED[axes](4, 8, 3).offset_head.weight.is_meta
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    jitter(real)
    output = real(image(axes, dtype=dtype))
    assert output.dtype == dtype and output.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(axes: int, half: torch.dtype) -> None:
    layer = PACKED[axes](4, 8, 3, padding=1, modulated=True)
    jitter(layer)
    input = image(axes)
    with torch.autocast("cpu", half):
        offset, mask = layer.predict(input)
        output = layer(input)
    assert output.dtype == half
    given = GIVEN[axes](4, 8, 3, padding=1, dtype=half)
    given.load_state_dict(layer.state_dict(), strict=False)
    assert_equal(output, given(input.to(half), offset, mask.to(half)))
    output.float().sum().backward()
    assert layer.offset_head.weight.grad is not None and layer.offset_head.weight.grad.dtype == torch.float32

    # Coordinates stay in float32: a shift that half precision cannot represent is not rounded.
    exact, fine = GIVEN[axes](4, 8, 1), torch.full((2, axes, *SIZE[:axes]), 0.5 + 2**-13)
    with torch.autocast("cpu", half):
        moved, rounded = exact(1e3 * input, fine), exact(1e3 * input, fine.to(half).float())
    assert not torch.equal(moved, rounded)


def test_channels_last() -> None:
    layer = dk.nn.PackedDeformConv2d(4, 8, 3, padding=1, modulated=True)
    jitter(layer)
    input = image(2)
    expected = layer(input)
    layer = layer.to(memory_format=torch.channels_last)
    output = layer(input.to(memory_format=torch.channels_last))
    assert_close(output, expected.double())


class Both(nn.Module):
    """A packed layer with zero padding, and one with padding="same" that pads explicitly."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.first = PACKED[axes](4, 8, 3, padding=1, modulated=True, offset_groups=2)
        self.second = PACKED[axes](8, 4, 2, padding="same", padding_mode="replicate")
        jitter(self.first)
        jitter(self.second)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input).relu())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(axes: int, dynamic: bool) -> None:
    torch._dynamo.reset()
    model, input = Both(axes), image(axes)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    expected = model(input)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    output = compiled(input)
    output.square().sum().backward()
    assert_close(output, expected.detach().double())
    for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
        assert_close(parameter.grad, grad.double(), name=name)


def test_export(axes: int) -> None:
    model, input = Both(axes), image(axes)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (input,), dynamic_shapes=({0: batch},))
    assert_close(program.module()(input), model(input).detach().double())
    more = torch.cat([input, input, input])
    assert program.module()(more).shape[0] == 6


ERRORS = [
    ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size is \(3, 3, 3\); it needs 2 values"),
    ({"kernel_size": 0}, ValueError, "kernel_size is 0; each value must be at least 1"),
    ({"kernel_size": 2.5}, TypeError, "kernel_size is 2.5; it must be an int"),
    ({"stride": 0}, ValueError, "stride is 0; each value must be at least 1"),
    ({"padding": -1}, ValueError, "padding is -1; each value must be at least 0"),
    ({"padding": "full"}, ValueError, "padding is 'full'; it must be one of 'same', 'valid' or numbers"),
    ({"padding": "same", "stride": 2}, ValueError, 'stride is 2; it must be 1 where padding is "same"'),
    ({"padding_mode": "wrap"}, ValueError, "padding_mode is 'wrap'; it must be one of 'zeros', 'reflect'"),
    ({"boundary": "clamp"}, ValueError, "boundary is 'clamp'; it must be one of 'zeros', 'border'"),
    ({"groups": 3}, ValueError, "in_channels is 4; it must be divisible by groups, which is 3"),
    ({"out_channels": 6, "groups": 4}, ValueError, "out_channels is 6; it must be divisible by groups, which is 4"),
    ({"offset_groups": 3}, ValueError, "in_channels is 4; it must be divisible by offset_groups, which is 3"),
    ({"offset_groups": 0}, ValueError, "offset_groups is 0; it must be at least 1"),
    ({"in_channels": 4.0}, TypeError, "in_channels is 4.0; it must be an int"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS, ids=[str(e[0]) for e in ERRORS])
@pytest.mark.parametrize("layer", [dk.nn.DeformConv2d, dk.nn.PackedDeformConv2d])
def test_wrong_constructor(layer: Any, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **wrong})


def test_wrong_forward() -> None:
    layer = dk.nn.DeformConv2d(4, 8, 3, padding=1, offset_groups=2)
    input, offset, mask = torch.randn(2, 4, 5, 6), torch.zeros(2, 36, 5, 6), torch.ones(2, 18, 5, 6)
    with pytest.raises(ValueError, match="input has 8 channels; this layer has in_channels=4"):
        layer(torch.randn(2, 8, 5, 6), offset)
    with pytest.raises(ValueError, match=r"offset has 18 channels; .* needs 36 = 2 groups x 9 taps x 2 coordinates"):
        layer(input, offset[:, :18])
    with pytest.raises(ValueError, match=r"mask has 9 channels; .* needs 18"):
        layer(input, offset, mask[:, :9])
    with pytest.raises(ValueError, match=r"offset has shape \[36, 5, 6\]; it must have 4 axes, as input has"):
        layer(input, offset[0])
    with pytest.raises(ValueError, match=r"input has shape \[5, 6\]; it must have 4 axes, or 3 unbatched"):
        layer(input[0, 0], offset)
    with pytest.raises(TypeError, match="offset is a NoneType; it must be a torch"):
        layer(input, None)
    with pytest.raises(ValueError, match="offset has 18 channels"):
        layer.sampling_locations(offset[:, :18])
    with pytest.raises(ValueError, match=r"offset has shape \[5, 6\]"):
        layer.sampling_locations(offset[0, 0])
    with pytest.raises(ValueError, match="offset has spatial size 4x6; the output has 5x6"):
        layer(input, offset[:, :, :4])


@pytest.mark.parametrize("unsplit", [27, 54])
def test_an_unsplit_offset_is_recognised(unsplit: int) -> None:
    layer = dk.nn.DeformConv2d(6, 8, 3, padding=1, offset_groups=unsplit // 27)
    with pytest.raises(ValueError, match=rf"{unsplit} = .* x 9 taps x \(2 coordinates \+ 1 mask\)"):
        layer(torch.randn(2, 6, 5, 6), torch.zeros(2, unsplit, 5, 6))


def test_a_packed_layer_checks_its_input_first(axes: int) -> None:
    """The check comes before the offset head runs, whose errors would be those of torch."""
    layer = getattr(dk.nn, f"PackedDeformConv{axes}d")(8, 4, 3, padding=1)
    sound = torch.randn(2, 8, *range(5, 5 + axes))
    for call in (layer, layer.predict):
        with pytest.raises(ValueError, match=r"^input has 3 channels; this layer has in_channels=8$"):
            call(sound[:, :3])
        with pytest.raises(ValueError, match=rf"^input has shape .*; it must have {axes + 2} axes, or {axes + 1} unba"):
            call(sound[0, 0])
        with pytest.raises(ValueError, match=rf"^input has 2 channels; .*; its {axes + 1} axes are taken as"):
            call(sound[..., 0])
        with pytest.raises(TypeError, match=r"^input has dtype torch\.float16; it must be torch\.float32, as weight's"):
            call(sound.half())
        with pytest.raises(TypeError, match=r"^input has dtype torch\.int64; it must be float16"):
            call(sound.long())


@pytest.mark.parametrize("kind", ["DeformConv", "PackedDeformConv"])
def test_messages_name_the_public_layer(kind: str, axes: int) -> None:
    name = f"{kind}{axes}d"
    make = getattr(dk.nn, name)
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) missing 1 required positional argument"):
        make(4, 4)
    layer = make(4, 4, 3)
    with pytest.raises(TypeError, match=rf"^{name}\.forward\(\) "):
        layer()
    for theirs in ("deform_groups", "deformable_groups"):
        with pytest.raises(TypeError, match=f"^{name} has no argument '{theirs}'; it is called 'offset_groups' here"):
            make(4, 4, 3, **{theirs: 2})
    assert "offset_groups" in inspect.signature(make).parameters
    assert type(copy.deepcopy(layer)) is make and make.forward.__doc__


def test_docstring_examples_run() -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 6 and result.failed == 0
