"""The layers and functions of compat.dc1d are compared with those of dc1d."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import assert_copied_compiled_and_halved
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal, evaluate
from deformkit.compat import dc1d as ours

theirs = pytest.importorskip("dc1d")
theirs_ops = pytest.importorskip("dc1d.ops")

LENGTH = 19
NAMES = ("input", "offsets", "mask")

# torch warns so about its own convolution, with which both predict offsets.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Such small layers spend most of their time waiting for threads, which is long on a busy machine.
    torch.set_num_threads(1)


def layer_options(seed: int) -> dict[str, Any]:
    """Random arguments of a layer with four channels."""
    draw = random.Random(seed)
    padding = draw.choice(["same", "valid", 0, 1, 3])
    return {
        "in_channels": 4,
        "out_channels": draw.choice([4, 8]),
        "kernel_size": draw.choice([1, 2, 3, 4]),
        "stride": 1 if padding == "same" else draw.choice([1, 2, 3]),
        "padding": padding,
        "dilation": draw.choice([1, 2, 3]),
        "groups": draw.choice([1, 2, 4]),
        "bias": draw.random() < 0.7,
        "padding_mode": draw.choice(["zeros", "reflect", "replicate", "circular"]),
        "unconstrained": draw.choice([None, False, True]),
    }


def pair(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer and the layer of dc1d, with the same random parameters."""
    one, other = getattr(ours, name)(**options).to(dtype), getattr(theirs, name)(**options).to(dtype)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    one.load_state_dict(other.state_dict(), strict=True)
    return one, other


def run(layer: nn.Module, arguments: list[Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of all arguments, by name, and of all parameters together.

    Together, because a single one may be zero up to rounding, as a slope before a norm if all activations are negative.
    """

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(parameters, values[len(arguments) :], strict=True))
        return torch.func.functional_call(layer, given, values[: len(arguments)])

    values = [*arguments, *parameters.values()]
    results = evaluate(call, values, range(len(values)), values[0].dtype)
    last = len(arguments) + 1
    named = dict(zip(["output", *NAMES], results[:last], strict=False))
    return {**named, "parameters": torch.cat([gradient.flatten() for gradient in results[last:]])}


def check(one: nn.Module, other: nn.Module, arguments: list[Tensor]) -> None:
    """Our values and gradients against theirs in float64; in a lower dtype, the error may be as large as theirs."""
    parameters = {name: parameter.detach() for name, parameter in one.named_parameters()}
    wide = copy.deepcopy(other).double()
    truth = run(wide, [a.double() for a in arguments], {n: p.double() for n, p in parameters.items()})
    actual, reference = run(one, arguments, parameters), run(other, arguments, parameters)
    for name, value in truth.items():
        assert_close(actual[name], value, reference[name], name)


def given(options: dict[str, Any], seed: int, dtype: torch.dtype) -> list[Tensor]:
    draw = random.Random(seed)
    other = theirs.DeformConv1d(**options)
    size = other.expected_offset_positions(LENGTH)
    offsets = 3 * torch.randn(2, draw.choice([1, 2, 4]), size, options["kernel_size"], dtype=dtype)
    if draw.random() < 0.3:  # on grid lines, on the ends of the window and of the sequence
        offsets = offsets.round()
    arguments = [torch.randn(2, 4, LENGTH, dtype=dtype), offsets]
    return [*arguments, torch.randn_like(offsets)] if draw.random() < 0.5 else arguments


@pytest.mark.parametrize("seed", range(60))
def test_values_and_gradients_of_the_layer(seed: int) -> None:
    options = layer_options(seed)
    check(*pair("DeformConv1d", **options), given(options, seed, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_in_lower_precision(seed: int, dtype: torch.dtype) -> None:
    # Quarters are exact in any dtype, so that no offset falls into another cell; 1/8 keeps them off the grid lines.
    options = layer_options(seed)
    arguments = given(options, seed, torch.float64)
    arguments[1] = (4 * arguments[1]).round().clamp(-12, 12) / 4 + 0.125
    check(*pair("DeformConv1d", dtype, **options), [a.to(dtype) for a in arguments])


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_values_and_gradients_of_the_packed_layer(seed: int, modulated: bool) -> None:
    options = {**layer_options(seed), "offset_groups": 2 ** (seed % 3), "modulated": modulated}
    one, other = pair("PackedDeformConv1d", **options)
    input = torch.randn(2, 4, LENGTH, dtype=torch.float64)
    check(one, other, [input])
    other.load_state_dict(one.state_dict(), strict=True)
    outputs = [layer(input, with_offsets=True) for layer in (one, other)]
    offsets = [output[1] if modulated else [output[1]] for output in outputs]
    assert_close(outputs[0][0], outputs[1][0])
    for actual, expected in zip(*offsets, strict=True):
        assert_close(actual, expected, name="offsets or mask")


@pytest.mark.parametrize("packed", [False, True])
def test_state_dicts_have_the_same_names_and_shapes(packed: bool) -> None:
    name, options = ("PackedDeformConv1d", {"offset_groups": 2, "modulated": True}) if packed else ("DeformConv1d", {})
    one, other = (getattr(host, name)(4, 6, 3, **options) for host in (ours, theirs))
    shapes = [{name: value.shape for name, value in layer.state_dict().items()} for layer in (one, other)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])


def test_positional_arguments_mean_the_same() -> None:
    for name, extra in (("DeformConv1d", ("cpu",)), ("PackedDeformConv1d", (2, "cpu"))):
        arguments = (4, 6, 3, 2, 1, 2, 2, False, "replicate", *extra)
        one, other = (getattr(host, name)(*arguments).double() for host in (ours, theirs))
        one.load_state_dict(other.state_dict(), strict=True)
        input = torch.randn(2, 4, LENGTH, dtype=torch.float64)
        offsets = [torch.randn(2, 1, one.expected_offset_positions(LENGTH), 3, dtype=torch.float64)]
        check(one, other, [input, *(offsets if name == "DeformConv1d" else [])])


@pytest.mark.parametrize("name", ["gLN", "cLN"])
def test_normalisations(name: str) -> None:
    one, other = pair(name, channel_size=5)
    check(one, other, [torch.randn(2, 7, 5, dtype=torch.float64)])
    constant = torch.full((2, 7, 5), 3.0, dtype=torch.float64)
    assert_close(one(constant), other(constant).detach())
    assert one.half()(constant.half()).isfinite().all()


CALLS = [
    ("efficient_linterpolate", {}),
    ("efficient_linterpolate", {"unconstrained": True, "gather_lerp": "recompute"}),
    ("kernel_width_linterpolate", {}),
    ("kernel_width_linterpolate", {"_max_memory": False}),
    ("full_seq_linterpolate", {}),
]


@pytest.mark.parametrize(("kernel_size", "dilation", "stride"), [(1, 1, 1), (3, 2, 1), (4, 1, 3)])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("name", "options"), CALLS, ids=lambda value: str(value))
def test_functions(
    name: str, options: dict[str, Any], groups: int, kernel_size: int, dilation: int, stride: int
) -> None:
    size = theirs_ops.output_length(LENGTH, kernel_size, dilation, stride)
    x = torch.randn(2, 4, LENGTH, dtype=torch.float32)
    offsets = 2 * torch.randn(2, groups, size, kernel_size, dtype=torch.float32)
    window = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, **options}
    # Two of their functions compute the positions of taps in float32 for any dtype of the arguments.
    actual, reference, truth = (
        evaluate(lambda x, o, f=f: f(x, o, **window), [x.to(dtype), offsets.to(dtype)], [0, 1], torch.float32)
        for f, dtype in (
            (getattr(ours.ops, name), torch.float32),
            (getattr(theirs_ops, name), torch.float32),
            (getattr(ours.ops, name), torch.float64),
        )
    )
    for what, *results in zip(
        ("output", "gradient of x", "gradient of offsets"), actual, truth, reference, strict=True
    ):
        assert_close(*results, name=what)
        assert_close(results[2], results[1], results[0], name=f"their {what}")


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("kernel_size", [1, 4])
def test_output_length(kernel_size: int, dilation: int) -> None:
    for length in range(30):
        for stride in (1, 2, 5):
            arguments = (length, kernel_size, dilation, stride)
            assert ours.ops.output_length(*arguments) == theirs_ops.output_length(*arguments)


def test_interpolation_functions_of_the_layer() -> None:
    input, offsets = torch.randn(2, 4, LENGTH), 4 * torch.randn(2, 2, 17, 3)
    for function in (
        ours.efficient_linterpolate,
        ours.kernel_width_linterpolate,
        ours.full_seq_linterpolate,
    ):
        layer = ours.DeformConv1d(4, 6, 3, bias=False, interpolation_function=function).double()
        expected = torch.einsum("fck,bcok->bfo", layer.weight, function(input.double(), offsets.double(), 3, 1, 1))
        assert_close(layer(input.double(), offsets.double()), expected)
    with pytest.raises(ValueError, match="interpolation_function is"):
        ours.DeformConv1d(4, 6, 3, interpolation_function=torch.lerp)
    with pytest.raises(ValueError, match="unconstrained is True"):
        ours.DeformConv1d(4, 6, 3, interpolation_function=ours.kernel_width_linterpolate, unconstrained=True)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("unconstrained", [False, True])
def test_sampling_locations_are_where_the_layer_reads(padding_mode: str, unconstrained: bool) -> None:
    layer = ours.DeformConv1d(
        1, 1, 3, 2, 2, 2, padding_mode=padding_mode, bias=False, unconstrained=unconstrained
    ).double()
    # A sample of a linear ramp is the position itself, as long as the whole window is in the input.
    line = torch.arange(40.0, dtype=torch.float64).reshape(1, 1, -1)
    offsets = torch.randn(1, 1, layer.expected_offset_positions(40), 3, dtype=torch.float64)
    locations = layer.sampling_locations(offsets)
    assert locations.shape == (1, 1, 3, 20, 1)
    expected = torch.einsum("fck,bcko->bfo", layer.weight, locations.squeeze(-1))
    inner = slice(4, 16)
    assert_close(layer(line, offsets)[..., inner], expected[..., inner].detach())


def test_offsets_sized_for_another_padding_are_refused_with_the_reason() -> None:
    layer = ours.DeformConv1d(8, 8, 16, 1, "same", 3)
    with pytest.raises(ValueError, match=r"83.*128") as raised:
        layer(torch.rand(2, 8, 128), torch.ones(2, 1, 83, 16))
    assert "sized for padding=\"valid\" while the layer says padding='same'" in str(raised.value)
    with pytest.raises(ValueError, match="offsets has 90 positions") as raised:
        layer(torch.rand(2, 8, 128), torch.ones(2, 1, 90, 16))
    assert "valid" not in str(raised.value)


def test_the_demonstration_of_the_module() -> None:
    options = {"kernel_size": 3, "padding": "same", "dilation": 128, "groups": 64, "unconstrained": True}
    one, other = pair("DeformConv1d", in_channels=64, out_channels=64, **options)
    input = torch.rand(4, 64, 133, dtype=torch.float64)
    check(one, other, [input, torch.ones(4, 1, one.expected_offset_positions(133), 3, dtype=torch.float64)])


def test_offsets_may_be_in_another_precision_than_the_input() -> None:
    layer = ours.DeformConv1d(4, 6, 3, dilation=100)
    input, offsets = torch.randn(2, 4, 210), (8 * torch.randn(2, 1, 10, 3)).bfloat16()
    expected = layer(input, offsets.float())
    # bfloat16 rounds the position 100.3 to 100.5, so positions in the window must not be computed in it.
    assert_equal(layer(input, offsets), expected)
    assert_equal(layer(input, offsets.double()), expected)
    layer.double()
    assert_equal(layer(input.double(), offsets, mask=None), layer(input.double(), offsets.double()))
    with pytest.raises(TypeError, match="offset has dtype"):
        layer(input.double(), offsets.long())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": torch.rand(4, 10)}, r"input has shape \[4, 10\]"),
        ({"input": torch.rand(2, 3, 10)}, "input has 3 channels"),
        ({"input": torch.rand(1, 4, 10)}, "offsets has batch size 2"),
        ({"offsets": torch.rand(2, 8, 3)}, r"offsets has shape \[2, 8, 3\]"),
        ({"offsets": torch.rand(2, 3, 8, 3)}, "offsets has 3 offset groups"),
        ({"offsets": torch.rand(2, 0, 8, 3)}, "offsets has 0 offset groups"),
        ({"offsets": torch.rand(2, 1, 8, 2)}, "offsets has 2 taps; kernel_size is 3"),
        ({"offsets": torch.rand(2, 1, 9, 3)}, "offsets has 9 positions"),
        ({"mask": torch.rand(2, 2, 8, 3)}, r"mask shape is \[2, 2, 8, 3\]; it must be \[2, 1, 8, 3\]"),
        ({"input": torch.rand(2, 4, 2)}, "offsets has 8 positions"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(arguments: dict[str, Tensor], message: str) -> None:
    layer = ours.DeformConv1d(4, 6, 3)
    fitting = {"input": torch.rand(2, 4, 10), "offsets": torch.rand(2, 1, 8, 3)}
    with pytest.raises(ValueError, match=message):
        layer(**fitting | arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "groups"),
        ({"padding": "full"}, "padding is 'full'"),
        ({"padding": "same", "stride": 2}, "stride is 2"),
        ({"padding_mode": "edge"}, "padding_mode is 'edge'"),
        ({"offset_groups": 3}, "offset_groups is 3; it must be a divisor of in_channels, which is 4"),
        ({"offset_groups": 0}, "offset_groups is 0"),
    ],
)
def test_constructors_refuse_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.PackedDeformConv1d(4, 6, 3, **options)


def test_functions_refuse_by_name() -> None:
    x, offsets = torch.rand(2, 4, 10), torch.rand(2, 1, 8, 3)
    with pytest.raises(ValueError, match="offsets has 8 positions; x of length 10 has 4 windows"):
        ours.efficient_linterpolate(x, offsets, 3, 1, 2)
    with pytest.raises(ValueError, match="unknown gather/lerp implementation: gather_lerp is 'fast'"):
        ours.efficient_linterpolate(x, offsets, 3, 1, 1, gather_lerp="fast")
    with pytest.raises(TypeError, match="offsets is a list"):
        ours.efficient_linterpolate(x, [0.0], 3, 1, 1)
    with pytest.raises(ValueError, match="stride is 0"):
        ours.efficient_linterpolate(x, offsets, 3, 1, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_layer_shows_of_itself(packed: bool) -> None:
    """The attributes are numbers, and a buffer moves with the layer, as in dc1d."""
    name = "PackedDeformConv1d" if packed else "DeformConv1d"
    one, other = (
        getattr(host, name)(4, 6, [3], (2,), 1, [4]) if host is ours else getattr(host, name)(4, 6, 3, 2, 1, 4)
        for host in (ours, theirs)
    )
    for attribute in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(one, attribute) == getattr(other, attribute), attribute
    (buffer,), (expected,) = (dict(layer.named_buffers()).items() for layer in (one, other))
    assert buffer[0] == expected[0]
    assert_equal(buffer[1], expected[1])
    assert one.to("meta").dilated_positions.device.type == "meta"
    assert ours.__version__ == theirs.__version__
    if not packed:
        assert repr(ours.DeformConv1d(8, 16, 3)) == "DeformConv1d(8, 16, kernel_size=3, stride=1)"
        free = ours.DeformConv1d(8, 16, 5, 2, 2, 3, 4, False, "zeros", unconstrained=True)
        assert repr(free) == (
            "DeformConv1d(8, 16, kernel_size=5, stride=2, padding=2, dilation=3, groups=4, bias=False, "
            "padding_mode='zeros', unconstrained=True)"
        )


@pytest.mark.parametrize(("name", "options"), CALLS, ids=lambda value: str(value))
def test_functions_take_numbers_in_sequences(name: str, options: dict[str, Any]) -> None:
    """The attributes are those of a layer of torch."""
    x, offsets, function = torch.rand(2, 4, 10), torch.rand(2, 1, 3, 3), getattr(ours.ops, name)
    assert_equal(function(x, offsets, (3,), [2], (2,), **options), function(x, offsets, 3, 2, 2, **options))
    assert ours.ops.output_length(10, (3,), [2], (2,)) == 3
    with pytest.raises(ValueError, match=r"stride is \[1, 2\]"):
        function(x, offsets, 3, 2, [1, 2], **options)


def test_an_offset_that_is_nan_is_visible() -> None:
    offsets = torch.zeros(1, 1, 8, 3)
    offsets[0, 0, 4, 1] = torch.nan
    output = ours.DeformConv1d(4, 6, 3)(torch.rand(1, 4, 10), offsets)
    assert output[..., 4].isnan().all()
    assert output[..., :4].isfinite().all()


def test_a_sequence_of_one_element() -> None:
    layer = ours.DeformConv1d(4, 6, 1, unconstrained=True)
    input = torch.rand(2, 4, 1)
    assert_equal(layer(input, torch.full((2, 1, 1, 1), 3.5)), layer(input, torch.zeros(2, 1, 1, 1)))


def test_a_free_layer_with_no_padding_is_the_plain_one_with_border() -> None:
    layer = ours.DeformConv1d(4, 6, 3, unconstrained=True)
    plain = dk.nn.DeformConv1d(4, 6, 3, boundary="border", offset_groups=2)
    plain.load_state_dict(layer.state_dict(), strict=True)
    input, offsets = torch.randn(2, 4, LENGTH), 3 * torch.randn(2, 2, 17, 3)
    assert_equal(layer(input, offsets), plain(input, offsets.transpose(2, 3).flatten(1, 2)))


@pytest.mark.parametrize("packed", [False, True])
def test_layers_compile_copy_and_run_in_mixed_precision(packed: bool) -> None:
    layer = ours.PackedDeformConv1d(4, 6, 3, modulated=True) if packed else ours.DeformConv1d(4, 6, 3)
    arguments = [torch.randn(2, 4, LENGTH)]
    arguments += [] if packed else [torch.randn(2, 2, 17, 3), torch.rand(2, 2, 17, 3)]
    assert_copied_compiled_and_halved(layer, arguments)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:(?s).*(ONNX|onnx|Constant folding|constants in the trace)")
@pytest.mark.parametrize("dynamo", [False, True], ids=["trace", "dynamo"])
def test_a_layer_exports_to_onnx(dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    layer = ours.PackedDeformConv1d(4, 6, 3, padding_mode="reflect", modulated=True).eval()
    input, path = torch.randn(2, 4, LENGTH), tmp_path / "layer.onnx"
    torch.onnx.export(layer, (input,), path, dynamo=dynamo, opset_version=18, verbose=False)
    session = runtime.InferenceSession(path)
    (answer,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    assert_close(torch.from_numpy(answer), copy.deepcopy(layer).double()(input.double()), layer(input))
