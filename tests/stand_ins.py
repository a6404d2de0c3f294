"""Stand-ins, with the same names and formulas, for host libraries that cannot be installed beside a CPU torch.

Each source is executed as a module of the host's name. ``calls`` counts what the host itself computed.
"""

import linecache
import sys
from types import ModuleType

import pytest

_PREAMBLE = """
import published
import torch
from torch import nn
from torch.nn import functional as F
from deformkit import reference
from deformkit.ops._shape import ntuple
calls = []

def pair(value):
    return ntuple(value, 2, "value", 0)
"""

SOURCES = {
    "torchvision.ops.deform_conv": """
def deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    calls.append("deform_conv2d")
    window = [pair(stride), pair(padding), pair(dilation)]
    return reference.deform_conv(input, offset, weight, bias, *window, mask, "zeros")

class DeformConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        super().__init__()
        self.in_channels = in_channels
        self.stride, self.padding, self.dilation = (1, 1), (padding, padding), (1, 1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *pair(kernel_size)))
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, input, offset, mask=None):
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return deform_conv2d(input, offset, self.weight, self.bias, mask=mask, **window)
""",
    "torchvision.ops": """
from .deform_conv import DeformConv2d, deform_conv2d
""",
    "mmcv.ops.deform_conv": """
class DeformConv2dFunction:
    @classmethod
    def apply(cls, input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deform_groups=1, bias=False,
              im2col_step=32):
        calls.append("deform_conv2d")
        window = [pair(stride), pair(padding), pair(dilation)]
        return reference.deform_conv(input, offset, weight, None, *window, None, "zeros")

deform_conv2d = DeformConv2dFunction.apply

class DeformConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = pair(kernel_size), (1, 1), pair(padding), (1, 1)
        self.groups = self.deform_groups = 1
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *self.kernel_size))

    def forward(self, x, offset):
        low = max(self.kernel_size[0] - x.size(2), 0)
        right = max(self.kernel_size[1] - x.size(3), 0)
        x, offset = F.pad(x, (0, right, 0, low)), F.pad(offset, (0, right, 0, low))
        steps = (self.stride, self.padding, self.dilation, self.groups, self.deform_groups, False, 32)
        out = deform_conv2d(x, offset, self.weight, *steps)
        return out[:, :, : out.size(2) - low, : out.size(3) - right]

class DeformConv2dPack(DeformConv2d):
    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        super().__init__(in_channels, out_channels, kernel_size, padding)
        self.conv_offset = nn.Conv2d(in_channels, 18, kernel_size, padding=padding)

    def forward(self, x):
        return super().forward(x, self.conv_offset(x))
""",
    "mmcv.ops.modulated_deform_conv": """
class ModulatedDeformConv2dFunction:
    @classmethod
    def apply(cls, input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deform_groups=1):
        calls.append("modulated_deform_conv2d")
        window = [pair(stride), pair(padding), pair(dilation)]
        return reference.deform_conv(input, offset, weight, bias, *window, mask, "zeros")

modulated_deform_conv2d = ModulatedDeformConv2dFunction.apply

class ModulatedDeformConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups, self.deform_groups = 1, padding, 1, 1, 1
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *pair(kernel_size)))
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, x, offset, mask):
        steps = (self.stride, self.padding, self.dilation, self.groups, self.deform_groups)
        return modulated_deform_conv2d(x, offset, mask, self.weight, self.bias, *steps)

class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    def __init__(self, in_channels, out_channels, kernel_size, padding=0):
        super().__init__(in_channels, out_channels, kernel_size, padding)
        self.conv_offset = nn.Conv2d(in_channels, 27, kernel_size, padding=padding)

    def forward(self, x):
        first, second, mask = self.conv_offset(x).chunk(3, dim=1)
        return super().forward(x, torch.cat((first, second), dim=1), torch.sigmoid(mask))
""",
    "mmcv.ops.deform_roi_pool": """
class DeformRoIPoolFunction:
    @classmethod
    def apply(cls, input, rois, offset, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1):
        calls.append("deform_roi_pool")
        return reference.deform_roi_pool(
            input, rois, offset, pair(output_size), spatial_scale, sampling_ratio, gamma, []
        )

deform_roi_pool = DeformRoIPoolFunction.apply

class DeformRoIPool(nn.Module):
    def __init__(self, output_size, spatial_scale=1.0, sampling_ratio=0, gamma=0.1):
        super().__init__()
        self.output_size, self.spatial_scale = pair(output_size), spatial_scale
        self.sampling_ratio, self.gamma = sampling_ratio, gamma

    def forward(self, input, rois, offset=None):
        numbers = (self.output_size, self.spatial_scale, self.sampling_ratio, self.gamma)
        return deform_roi_pool(input, rois, offset, *numbers)

class DeformRoIPoolPack(DeformRoIPool):
    def forward(self, input, rois):
        means = deform_roi_pool(input, rois, None, self.output_size)
        offset = means[:, :2].tanh()
        return deform_roi_pool(input, rois, offset, self.output_size, self.spatial_scale, self.sampling_ratio)
""",
    "mmcv.ops.multi_scale_deform_attn": """
def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    calls.append("multi_scale_deformable_attn_pytorch")
    levels, points = sampling_locations.shape[3:5]
    flat = [v for size in value_spatial_shapes.tolist() for v in size]
    places = sampling_locations.flatten(3, 4), attention_weights.flatten(3, 4)
    return reference.ms_deform_attn(value, flat, *places, [points] * levels, "linear")

class MultiScaleDeformableAttnFunction:
    @classmethod
    def apply(cls, value, value_spatial_shapes, value_level_start_index, *rest):
        *places, im2col_step = rest
        return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, *places)

class MultiScaleDeformableAttention(nn.Module):
    def forward(self, value, value_spatial_shapes, sampling_locations, attention_weights, kernel):
        places = (sampling_locations, attention_weights)
        if kernel:
            starts = torch.tensor([0, *value_spatial_shapes.prod(1).cumsum(0).tolist()[:-1]])
            return MultiScaleDeformableAttnFunction.apply(value, value_spatial_shapes, starts, *places, 64)
        return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, *places)
""",
    "ultralytics.nn.modules.utils": """
def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    # locations [B, Q, H, L*P, 2] and weights [B, Q, H, L*P], as many points on every level
    calls.append("multi_scale_deformable_attn_pytorch")
    batch, _, heads, _ = value.shape
    points = sampling_locations.shape[3] // len(value_spatial_shapes)
    fields = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in value_spatial_shapes], -1)
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1).split(points, 2)
    reads = [
        F.grid_sample(field.unflatten(-1, size), grid, align_corners=False)
        for field, grid, size in zip(fields, grids, map(tuple, value_spatial_shapes))
    ]
    weights = attention_weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)
    return (torch.cat(reads, -1) * weights).sum(-1).unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)
""",
    "ultralytics.nn.modules.transformer": """
from .utils import multi_scale_deformable_attn_pytorch

class MSDeformAttn(nn.Module):
    def forward(self, value, shapes, locations, weights):
        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
""",
    "rfdetr.models.ops.functions.ms_deform_attn_func": """
from ultralytics.nn.modules.utils import multi_scale_deformable_attn_pytorch as points_merged

def ms_deform_attn_core_pytorch(
    value, value_spatial_shapes, sampling_locations, attention_weights, value_spatial_shapes_hw=None
):
    # value [B, H, D, S]; locations [B, Q, H, L, P, 2] or merged; weights [B, Q, H, L*P]
    calls.append("ms_deform_attn_core_pytorch")
    shapes = value_spatial_shapes_hw or value_spatial_shapes.tolist()
    locations = sampling_locations if sampling_locations.dim() == 5 else sampling_locations.flatten(3, 4)
    return points_merged(value.permute(0, 3, 1, 2), shapes, locations, attention_weights)
""",
    "rfdetr.models.ops.functions": """
from .ms_deform_attn_func import ms_deform_attn_core_pytorch
""",
    "rfdetr.models.ops.modules.ms_deform_attn": """
from rfdetr.models.ops.functions import ms_deform_attn_core_pytorch

class MSDeformAttn(nn.Module):
    def forward(self, value, shapes, locations, weights, pairs=None):
        return ms_deform_attn_core_pytorch(value, shapes, locations, weights, value_spatial_shapes_hw=pairs)
""",
    "models.ops.functions.ms_deform_attn_func": """
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

class MSDeformAttnFunction:
    @classmethod
    def apply(cls, value, value_spatial_shapes, value_level_start_index, *rest):
        calls.append("MSDeformAttnFunction")
        *places, im2col_step = rest
        return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, *places)
""",
    "models.ops.modules.ms_deform_attn": """
from ..functions.ms_deform_attn_func import MSDeformAttnFunction

class MSDeformAttn(nn.Module):
    def forward(self, value, shapes, starts, locations, weights):
        return MSDeformAttnFunction.apply(value, shapes, starts, locations, weights, 64)
""",
    "deformable_attention.deformable_attention_1d": """
from deformkit.compat import deformable_attention as compat

class DeformableAttention1D(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = compat.DeformableAttention1D(**options)
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.to_offsets = nn.Sequential(*layer.to_offsets, nn.Flatten(1))
        self.heads, self.offset_groups = layer.heads, layer.offset_groups

    def forward(self, x, return_vgrid=False):
        calls.append("DeformableAttention1D")
        offsets = self.to_offsets(self.to_q(x).unflatten(1, (self.offset_groups, -1)).flatten(0, 1))
        vgrid = offsets + torch.arange(offsets.shape[-1])
        output = published.deformable_attention(self, x, vgrid.unsqueeze(1))
        return (output, vgrid) if return_vgrid else output
""",
    "monai.networks.blocks.warp": """
class Warp(nn.Module):
    def __init__(self, mode="bilinear", padding_mode="border", jitter=False):
        super().__init__()
        self._interp_mode, self._padding_mode, self.jitter = mode, padding_mode, jitter

    def forward(self, image, ddf):
        calls.append("Warp")
        modes = (self._interp_mode, self._padding_mode)
        return F.grid_sample(image, published.normalised(ddf), *modes, align_corners=True)
""",
    "voxelmorph.nn.modules": """
class SpatialTransformer(nn.Module):
    def __init__(self, interpolation_mode="linear", align_corners=True, device=None):
        super().__init__()
        self.interpolation_mode, self.align_corners = interpolation_mode, align_corners

    def forward(self, moving_image, deformation_field):
        calls.append("SpatialTransformer")
        grid = published.normalised(deformation_field)
        return F.grid_sample(moving_image, grid, align_corners=self.align_corners)
""",
}


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> ModuleType:
    """Make the modules ``names`` importable, in this order, until the test ends; return the last one."""
    module = ModuleType("none")
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                created = ModuleType(path)
                created.__path__ = []
                monkeypatch.setitem(sys.modules, path, created)
                if depth > 1:
                    setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], created)
        module = sys.modules[name]
        module.__package__ = ".".join(parts[:-1]) if name in _LEAVES else name
        source, file = _PREAMBLE + SOURCES[name], f"<{name}>"
        # TorchScript reads the source of the class of a layer.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec"), vars(module))
    return module


_LEAVES = {name for name in SOURCES if not any(other.startswith(f"{name}.") for other in SOURCES)}
