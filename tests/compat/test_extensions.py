"""Import shims of mmcv, Sparse4D, NLSPN, RVRT, RAFT and DCNv4's attention, called as those programs call them."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drawn
import published
import pytest
import torch
from shims import as_function, compare, found
from torch import Tensor

from deformkit import compat
from deformkit._testing import assert_equal
from deformkit.compat import deformable_detr
from deformkit.compat import mmcv as ours


def names(keys: Sequence[str], pairs: Sequence[Sequence[int]]) -> dict[str, int]:
    """Numbers along h and w, by the names that mmcv gives them."""
    return dict(zip(keys, (number for pair in pairs for number in pair), strict=True))


@pytest.mark.parametrize("seed", [1, 4])
def test_mmcv_deform_conv(seed: int) -> None:
    module, case = found("mmcv._ext"), drawn.conv(seed, modulated=False, bias=False)
    named = case.arguments(torch.float64, seed=seed)
    steps = [named[name] for name in ("stride", "padding", "dilation")]
    keys = ("kH", "kW", "dH", "dW", "padH", "padW", "dilationH", "dilationW")
    numbers = names(keys, [case.kernel_size, *steps])
    numbers |= {"group": case.groups, "deformable_group": case.offset_groups, "im2col_step": 1}
    tensors = [named[name] for name in ("input", "offset", "weight")]

    def forward(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        output = torch.full((case.batch, case.out_channels, *offset.shape[2:]), float("nan"), dtype=input.dtype)
        module.deform_conv_forward(input, weight, offset, output, input.new_empty(0), input.new_empty(0), **numbers)
        return output

    def backward(grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor) -> list[Tensor]:
        grads = [torch.zeros_like(tensor) for tensor in (input, offset, weight)]
        buffers = [input.new_empty(0), input.new_empty(0)]
        module.deform_conv_backward_input(input, offset, grad, *grads[:2], weight, buffers[0], **numbers)
        module.deform_conv_backward_parameters(input, offset, grad, grads[2], *buffers, scale=1, **numbers)
        return grads

    def theirs(input: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        return published.modulated_conv(input, offset, None, weight, None, *steps, case.groups, case.offset_groups)

    compare(as_function(forward, backward), theirs, tensors)


@pytest.mark.parametrize("with_bias", [True, False])
def test_mmcv_modulated_deform_conv(with_bias: bool) -> None:
    module, case = found("mmcv._ext"), drawn.conv(2, modulated=True, bias=True)
    named = case.arguments(torch.float64, seed=2)
    steps = [named[name] for name in ("stride", "padding", "dilation")]
    keys = ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    numbers: dict[str, Any] = names(keys, [case.kernel_size, *steps])
    numbers |= {"group": case.groups, "deformable_group": case.offset_groups, "with_bias": with_bias}
    buffer, none = torch.empty(0), torch.empty(0, dtype=torch.float64)

    def forward(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor = none) -> Tensor:
        output = torch.empty(case.batch, case.out_channels, *offset.shape[2:], dtype=input.dtype)
        module.modulated_deform_conv_forward(input, weight, bias, buffer, offset, mask, output, buffer, **numbers)
        return output

    def backward(
        grad: Tensor, input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor = none
    ) -> list[Tensor]:
        given = (input, weight, bias, offset, mask)
        grads = [torch.zeros_like(tensor) for tensor in given]
        module.modulated_deform_conv_backward(
            input, weight, bias, buffer, offset, mask, buffer, *grads, grad, **numbers
        )
        by_input, by_weight, by_bias, by_offset, by_mask = grads
        return [by_input, by_offset, by_mask, by_weight, by_bias][: 4 + with_bias]

    def theirs(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        groups = (case.groups, case.offset_groups)
        return published.modulated_conv(input, offset, mask, weight, bias, *steps, *groups)

    tensors = [named[name] for name in ("input", "offset", "mask", "weight", "bias")]
    compare(as_function(forward, backward), theirs, tensors[: 4 + with_bias])


@pytest.mark.parametrize("moved", [True, False])
def test_mmcv_deform_roi_pool(moved: bool) -> None:
    module = found("mmcv._ext")
    rois = torch.tensor([[0, 1.3, 2.2, 9.1, 8.4], [1, 0.2, 0.1, 4.4, 10.7]]).double()
    numbers = {"pooled_height": 3, "pooled_width": 2, "spatial_scale": 0.7, "sampling_ratio": 2, "gamma": 0.2}
    offset = torch.randn(2, 2, 3, 2).double() if moved else torch.empty(0).double()
    tensors = [torch.randn(2, 3, 9, 8).double(), *([offset] if moved else [])]

    def forward(input: Tensor, offset: Tensor = offset) -> Tensor:
        output = input.new_zeros(2, 3, 3, 2)
        module.deform_roi_pool_forward(input, rois, offset, output, **numbers)
        return output

    def backward(grad: Tensor, input: Tensor, offset: Tensor = offset) -> list[Tensor]:
        grads = [torch.zeros_like(input), torch.zeros_like(offset)]
        module.deform_roi_pool_backward(grad, input, rois, offset, *grads, **numbers)
        return grads[: 1 + moved]

    def theirs(input: Tensor, offset: Tensor | None = None) -> Tensor:
        return ours.deform_roi_pool(input, rois, offset, (3, 2), 0.7, 2, 0.2)

    compare(as_function(forward, backward), theirs, tensors)
    rois[0, 0] = 7
    with pytest.raises(ValueError, match="rois"):
        forward(*tensors)


def test_mmcv_ms_deform_attn() -> None:
    module = found("mmcv._ext")
    shapes, starts = torch.tensor([[3, 4], [2, 5]]), torch.tensor([0, 12])
    tensors = [torch.randn(2, 22, 3, 4), torch.rand(2, 5, 3, 2, 2, 2), torch.randn(2, 5, 3, 2, 2)]
    tensors = [tensor.double() for tensor in tensors]

    def forward(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return module.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)

    def backward(grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> list[Tensor]:
        grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
        module.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, *grads, im2col_step=64)
        return grads

    def theirs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return attention(value, shapes.tolist(), locations, weights)

    compare(as_function(forward, backward), theirs, tensors)


def attention(value: Tensor, shapes: list[list[int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The formula of Deformable DETR, one level after the other."""
    total, start = torch.zeros(()), 0
    for level, (height, width) in enumerate(shapes):
        field = (
            value[:, start : start + height * width].permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (height, width))
        )
        x, y = locations[:, :, :, level].transpose(1, 2).flatten(0, 1).unbind(-1)
        read = published.linear(field, y * height - 0.5, x * width - 0.5)
        total = total + (read * weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)
        start += height * width
    return total.unflatten(0, (value.shape[0], value.shape[2])).flatten(1, 2).transpose(1, 2)


def test_mmcv_imports_all_its_operators_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each module of mmcv.ops asks the extension for its functions when it is imported, and calls them later."""
    if "mmcv" in sys.modules:
        pytest.skip("mmcv itself is installed")
    (tmp_path / "mmcv" / "ops").mkdir(parents=True)
    (tmp_path / "mmcv" / "__init__.py").write_text("")
    lines = [
        "ext = importlib.import_module('mmcv._ext')",
        "assert hasattr(ext, 'nms') and hasattr(ext, 'deform_conv_forward')",
    ]
    (tmp_path / "mmcv" / "ops" / "__init__.py").write_text("\n".join(["import importlib", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    assert compat.install("mmcv._ext") == ("mmcv._ext",)
    ext = importlib.import_module("mmcv.ops").ext
    with pytest.raises(NotImplementedError, match=r"mmcv\._ext\.nms was called"):
        ext.nms(torch.zeros(1), iou_threshold=0.5)
    assert not hasattr(ext, "__path__")
    for name in ("mmcv.ops", "mmcv"):
        del sys.modules[name]


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("modulated", [False, True])
def test_dcn_of_images_and_volumes(axes: int, modulated: bool) -> None:
    module = found("DCN" if axes == 2 else "D3D")
    kernel, stride, padding, dilation = ([3, 2, 2][:axes], [1, 2, 1][:axes], [1, 0, 2][:axes], [2, 1, 1][:axes])
    size = [7, 6, 5][:axes]
    numbers = (size, kernel, stride, padding, dilation)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(*numbers, strict=True)]
    taps = torch.tensor(kernel).prod().item()
    input, weight, bias = torch.randn(2, 4, *size), torch.randn(6, 2, *kernel), torch.randn(6)
    offset, mask = torch.randn(2, 2 * taps * axes, *out), torch.rand(2, 2 * taps, *out)
    flat = (*kernel, *stride, *padding, *dilation, 2, 2, 64)
    tensors = [t.double() for t in (input, weight, bias, offset, *([mask] if modulated else []))]
    prefix = "modulated_deform_conv" if modulated else "deform_conv"

    def forward(*tensors: Tensor) -> Tensor:
        return getattr(module, f"{prefix}_forward")(*tensors, *flat)

    def backward(grad: Tensor, *tensors: Tensor) -> list[Tensor]:
        by_input, by_offset, *rest = getattr(module, f"{prefix}_backward")(*tensors, grad, *flat)
        by_mask, (by_weight, by_bias) = (rest[:1], rest[1:]) if modulated else ([], rest)
        return [by_input, by_weight, by_bias, by_offset, *by_mask]

    def theirs(input: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return published.modulated_conv(input, offset, mask, weight, bias, stride, padding, dilation, 2, 2)

    compare(as_function(forward, backward), theirs, tensors)
    with pytest.raises(NotImplementedError, match="roi_align_forward was called"):
        module.roi_align_forward(input)
    with pytest.raises(ValueError, match=f"there must be {4 * axes + 3}"):
        getattr(module, f"{prefix}_forward")(*tensors, *flat[1:])


@pytest.mark.parametrize("by_camera", [False, True])
@pytest.mark.parametrize("depths", [0, 3])
def test_aggregation_of_sparse4d(by_camera: bool, depths: int) -> None:
    """Both forms: the maps by camera with one point for a query, and all maps in a row with several points."""
    module = found("deformable_aggregation_with_depth_ext" if depths else "deformable_aggregation_ext")
    sizes, batch, queries, points, cameras, channels, groups = [(4, 5), (2, 3)], 2, 3, 1 if by_camera else 2, 2, 6, 3
    length = sum(height * width for height, width in sizes)
    features = torch.randn(batch, cameras, length, channels + depths).double()
    # Some points lie outside the image, or beyond the last depth.
    locations = torch.rand(batch, queries, points, cameras, 2).double() * 1.4 - 0.2
    if depths:
        z = torch.rand(batch, queries, points, cameras, 1).double() * (depths + 2) - 1.5
        locations = torch.cat([locations, z], -1)
    weights = torch.randn(batch, queries, points, cameras, len(sizes), groups).double()
    shapes, starts = torch.tensor(sizes), torch.tensor([0, 20])
    tensors = [features, locations, weights]
    if by_camera:
        tensors = [features, locations[:, :, 0], weights[:, :, 0]]
    else:
        tensors[0] = features.flatten(1, 2)
        shapes, starts = shapes.repeat(cameras, 1, 1), torch.stack([starts, starts + length])
    prefix, extra = ("deformable_aggregation_with_depth", (depths,)) if depths else ("deformable_aggregation", ())

    def forward(features: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        given = (features, shapes.int(), starts.int(), locations, weights)
        return getattr(module, f"{prefix}_forward")(*given, *extra)

    def backward(grad: Tensor, features: Tensor, locations: Tensor, weights: Tensor) -> list[Tensor]:
        grads = [torch.zeros_like(tensor) for tensor in (features, locations, weights)]
        given = (features, shapes.int(), starts.int(), locations, weights)
        assert getattr(module, f"{prefix}_backward")(*given, *extra, grad, *grads) is None
        return grads

    def theirs(features: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        features = features.reshape(batch, cameras, length, -1)
        locations = locations.reshape(batch, queries, points, cameras, -1)
        weights = weights.reshape(batch, queries, points, cameras, len(sizes), groups)
        total, start = torch.zeros(()), 0
        for scale, (height, width) in enumerate(sizes):
            for camera in range(cameras):
                field = (
                    features[:, camera, start : start + height * width].transpose(1, 2).unflatten(-1, (height, width))
                )
                x, y, *z = locations[:, :, :, camera].unbind(-1)
                places, seen = [y * height - 0.5, x * width - 0.5], (x > 0) & (x < 1) & (y > 0) & (y < 1)
                if depths:
                    # A volume, the product of features and probabilities, with depth as its first axis.
                    field = field[:, :channels].unsqueeze(2) * field[:, channels:].unsqueeze(1)
                    places = [p.unsqueeze(-1) for p in (z[0], *places)]
                read = published.linear(field, *places)
                read = (read.squeeze(-1) if depths else read).unflatten(1, (groups, -1))
                weight = (weights[:, :, :, camera, scale] * seen.unsqueeze(-1)).permute(0, 3, 1, 2).unsqueeze(2)
                total = total + (read * weight).sum(-1).flatten(1, 2).transpose(1, 2)
            start += height * width
        return total

    compare(as_function(forward, backward), theirs, tensors)


def test_attention_of_dcnv4() -> None:
    module = found("DCNv4")
    shapes, starts = torch.tensor([[3, 4], [2, 5]]), torch.tensor([0, 12])
    value, packed = torch.randn(2, 22, 3, 4).double(), torch.rand(2, 5, 3, 2 * 4 * 3).double()

    def forward(value: Tensor, packed: Tensor) -> Tensor:
        return module.ext.flash_deform_attn_forward(value, shapes, starts, packed, 64, 4, 8, 128)

    def backward(grad: Tensor, value: Tensor, packed: Tensor) -> list[Tensor]:
        return module.ext.flash_deform_attn_backward(value, shapes, starts, packed, grad, 64, 4, 2, 128)

    def theirs(value: Tensor, packed: Tensor) -> Tensor:
        weights = packed[..., 16:].softmax(-1).unflatten(-1, (2, 4))
        return attention(value, shapes.tolist(), packed[..., :16].unflatten(-1, (2, 4, 2)), weights)

    compare(as_function(forward, backward), theirs, [value, packed])
    from DCNv4.functions import FlashDeformAttnFunction  # type: ignore[import-not-found]
    from DCNv4.modules.flash_deform_attn import FlashDeformAttn  # type: ignore[import-not-found]

    compare(lambda *t: FlashDeformAttnFunction.apply(t[0], shapes, starts, t[1], 64, 4), theirs, [value, packed])
    layer, plain = FlashDeformAttn(16, 2, 4, 4), deformable_detr.MSDeformAttn(16, 2, 4, 4)
    plain.load_state_dict(layer.state_dict())
    given = (torch.randn(1, 5, 16), torch.rand(1, 5, 2, 2), torch.randn(1, 22, 16), shapes, starts)
    assert_equal(layer(*given), plain(*given))


@pytest.mark.parametrize(("heads", "groups"), [(2, 4), (4, 2), (2, 12)])
def test_attention_of_rvrt(heads: int, groups: int) -> None:
    """A head with its own points, heads that share points, and a head with several groups of channels."""
    module, clips, frames, channels, size = found("deform_attn"), 2, 2, 12, (4, 5)
    area, batch = size[0] * size[1], clips * frames
    q, kv = torch.randn(batch, 1, channels, *size).double(), torch.randn(clips, frames, 2 * channels, *size).double()
    offset = torch.randn(batch, frames * groups * 6 * 2, *size).double()
    numbers = (3, 2, 1, 1, 1, 0, 1, 2, heads, groups, frames)
    buffers = [torch.empty(0)] * 5

    def forward(q: Tensor, kv: Tensor, offset: Tensor) -> Tensor:
        output = q.new_empty(q.shape)
        module.deform_attn_forward(q, kv, offset, output, *buffers[:3], *numbers)
        return output

    def backward(grad: Tensor, *tensors: Tensor) -> list[Tensor]:
        grads = [torch.zeros_like(tensor) for tensor in tensors]
        module.deform_attn_backward(*tensors, *buffers, *grads, grad, *numbers)
        return grads

    def theirs(q: Tensor, kv: Tensor, offset: Tensor) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(4.0).double(), torch.arange(5.0).double(), indexing="ij")
        outputs = []
        for b in range(batch):
            shifts = offset[b].unflatten(0, (frames, groups, 6, 2))
            reads = []
            for n in range(frames):
                frame = kv[b // frames, (b + n) % frames].unflatten(0, (groups, -1))
                taps = [
                    published.linear(
                        frame, rows - 1 + tap // 2 + shifts[n, :, tap, 0], columns + tap % 2 * 2 + shifts[n, :, tap, 1]
                    )
                    for tap in range(6)
                ]
                reads.append(torch.stack(taps).flatten(1, 2))
            # [points, 2, heads, channels of a head, pixels]
            points = torch.cat(reads).flatten(2).unflatten(1, (2, heads, -1))
            key, value = points.unbind(1)
            query = q[b].reshape(heads, -1, area)
            scores = (key * query).sum(2) / (channels // heads) ** 0.5
            outputs.append((scores.softmax(0).unsqueeze(2) * value).sum(0).reshape(q.shape[1:]))
        return torch.stack(outputs)

    compare(as_function(forward, backward), theirs, [q, kv, offset])


def test_correlation_of_raft() -> None:
    module, radius = found("alt_cuda_corr"), 2
    first, second = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 5, 6, 8).double()
    coords = torch.rand(2, 2, 3, 4, 2).double() * 7 - 1

    def forward(first: Tensor, second: Tensor) -> Tensor:
        (corr,) = module.forward(first, second, coords, radius)
        return corr

    def backward(grad: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
        *grads, by_coords = module.backward(first, second, coords, grad, radius)
        assert_equal(by_coords, torch.zeros_like(coords))
        return grads

    def theirs(first: Tensor, second: Tensor) -> Tensor:
        field = second.permute(0, 3, 1, 2)
        windows = []
        for right in range(-radius, radius + 1):
            for down in range(-radius, radius + 1):
                reads = [
                    published.linear(field, y + down, x + right) for x, y in (c.unbind(-1) for c in coords.unbind(1))
                ]
                windows.append(torch.stack([(read * first.permute(0, 3, 1, 2)).sum(1) for read in reads], 1))
        return torch.stack(windows, 2)

    compare(as_function(forward, backward), theirs, [first, second])


@pytest.mark.parametrize("axes", [1, 2])
def test_sampler_of_raft_stereo(axes: int) -> None:
    module, radius = found("corr_sampler"), 2
    volume = torch.randn(2, 3, 4, *[5, 6][2 - axes :]).double()
    coords = torch.rand(2, 2, 3, 4) * 7 - 1

    def forward(volume: Tensor) -> Tensor:
        (corr,) = module.forward(volume, coords, radius)
        return corr

    def backward(grad: Tensor, volume: Tensor) -> list[Tensor]:
        return module.backward(volume, coords, grad, radius)

    def theirs(volume: Tensor) -> Tensor:
        fields = volume.reshape(24, 1, -1, 6)
        x, y = (coords[:, i].double().reshape(24, 1, 1) for i in (0, 1))
        steps = torch.arange(-radius, radius + 1).double()
        right, down = torch.meshgrid(steps, steps if axes == 2 else torch.zeros(1).double(), indexing="ij")
        read = published.linear(fields, (y if axes == 2 else y * 0) + down, x + right)
        return read.reshape(2, 3, 4, *[5] * axes).movedim((1, 2), (-2, -1))

    compare(as_function(forward, backward), theirs, [volume])


def test_an_extension_in_a_package_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin" / "ops").mkdir(parents=True)
    (tmp_path / "plugin" / "__init__.py").write_text("")
    (tmp_path / "plugin" / "ops" / "__init__.py").write_text("from . import deformable_aggregation_ext as ext")
    monkeypatch.syspath_prepend(tmp_path)
    name = "plugin.ops.deformable_aggregation_ext"
    assert compat.install(name) == (name,)
    assert importlib.import_module("plugin.ops").ext.__name__.startswith("deformkit.compat.")
    assert compat.uninstall() == (name,)


def test_errors_of_the_extensions() -> None:
    aggregation, corr, attn = (found(n) for n in ("deformable_aggregation_ext", "alt_cuda_corr", "deform_attn"))
    features, locations = torch.zeros(1, 26, 6), torch.zeros(1, 3, 1, 1, 2)
    with pytest.raises(ValueError, match=r"weights has shape \[1, 3, 1, 1, 3, 2\]; it must be \[1, 3, 1, 1, 2, 'G'\]"):
        weights = torch.zeros(1, 3, 1, 1, 3, 2)
        aggregation.deformable_aggregation_forward(features, [[[4, 5], [2, 3]]], None, locations, weights)
    with pytest.raises(ValueError, match=r"coords has shape .*; it must be \[1, N, 3, 4, 2\]"):
        corr.forward(torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 2), 4)
    q, kv = torch.zeros(2, 4, 3, 3), torch.zeros(1, 2, 8, 3, 3)
    with pytest.raises(ValueError, match=r"offset has shape \[2, 18, 3, 3\]; it must be \[2, 72, 3, 3\]"):
        offset, output = torch.zeros(2, 18, 3, 3), torch.zeros_like(q)
        attn.deform_attn_forward(q, kv, offset, output, q, q, q, 3, 3, 1, 1, 1, 1, 1, 1, 2, 2, 2)
    grad = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"grad_output has shape \[1, 2\]; the output has \[1, 1, 81, 3, 4\]"):
        corr.backward(torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 8), torch.zeros(1, 1, 3, 4, 2), grad, 4)
