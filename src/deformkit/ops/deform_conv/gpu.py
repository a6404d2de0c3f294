"""Deformable convolution on a GPU: the arguments of its Triton kernels, and the choice of their tiles."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import Config

from .._shape import prod
from ..gpu.launch import Blocks, launch, row_configs, target
from ..sample.gpu_launch import FieldGradient, asked_for, largest, largest_index, lifted, packed, rule, steps, strided
from .gpu_kernels import (
    Groups,
    Inputs,
    deform_conv_backward_data,
    deform_conv_backward_weight,
    deform_conv_forward,
    deform_conv_forward_depthwise,
)

# One program for each multiprocessor of a large GPU.
_PROCESSORS = 132
# Tiles of the kernels with products (rows, filters, columns, parts, warps, stages), by architecture, kernel and whether
# the operands are half precision. These spill no registers; the ones with fewest instructions come first.
_TILES = {
    ("sm_80", "forward", True): [(128, 128, 16, 4, 8, 1), (64, 128, 16, 4, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("sm_80", "forward", False): [(128, 64, 16, 4, 8, 1), (64, 64, 16, 4, 4, 1)],
    ("sm_80", "data", True): [(64, 32, 16, 1, 4, 1), (64, 64, 16, 1, 4, 1), (128, 64, 16, 1, 8, 1)],
    ("sm_80", "data", False): [(64, 32, 16, 1, 8, 1), (128, 64, 16, 1, 8, 1)],
    ("sm_80", "weight", True): [(64, 128, 32, 2, 8, 1), (64, 64, 16, 4, 4, 1), (128, 64, 64, 1, 8, 1)],
    ("sm_80", "weight", False): [(64, 64, 32, 2, 8, 1), (64, 128, 32, 1, 8, 1), (64, 64, 32, 1, 4, 1)],
    ("sm_90", "forward", True): [(128, 128, 16, 4, 8, 1), (64, 128, 16, 4, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("sm_90", "forward", False): [(128, 64, 32, 2, 8, 1), (64, 64, 32, 2, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("sm_90", "data", True): [(128, 64, 32, 2, 8, 1), (64, 32, 32, 2, 4, 1), (64, 64, 32, 1, 4, 1)],
    ("sm_90", "data", False): [(128, 64, 32, 2, 8, 1), (64, 32, 32, 2, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("sm_90", "weight", True): [(64, 128, 32, 2, 8, 1), (64, 64, 16, 4, 4, 1), (128, 64, 64, 1, 8, 1)],
    ("sm_90", "weight", False): [(64, 128, 32, 2, 8, 1), (64, 64, 32, 2, 8, 1), (64, 64, 32, 1, 4, 1)],
    ("sm_100", "forward", True): [(128, 128, 32, 2, 8, 1), (128, 64, 32, 2, 8, 1), (64, 64, 32, 2, 4, 1)],
    ("sm_100", "forward", False): [(128, 64, 32, 2, 8, 1), (64, 64, 32, 2, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("sm_100", "data", True): [(128, 64, 32, 2, 8, 1), (64, 64, 32, 1, 8, 1), (64, 32, 32, 2, 4, 1)],
    ("sm_100", "data", False): [(128, 64, 32, 2, 8, 1), (64, 32, 32, 2, 4, 1), (64, 64, 32, 1, 4, 1)],
    ("sm_100", "weight", True): [(64, 128, 32, 2, 8, 1), (64, 64, 16, 4, 4, 1), (128, 64, 64, 1, 8, 1)],
    ("sm_100", "weight", False): [(64, 64, 32, 2, 8, 1), (64, 128, 32, 1, 8, 1), (64, 64, 32, 1, 4, 1)],
    ("hip", "forward", True): [(128, 128, 16, 4, 8, 1), (64, 128, 16, 4, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("hip", "forward", False): [(128, 128, 16, 4, 8, 1), (64, 128, 16, 4, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("hip", "data", True): [(64, 32, 32, 2, 4, 1), (64, 64, 32, 1, 4, 1)],
    ("hip", "data", False): [(64, 32, 32, 2, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("hip", "weight", True): [(64, 128, 16, 4, 4, 1), (64, 64, 16, 4, 4, 1)],
    ("hip", "weight", False): [(64, 64, 16, 4, 4, 1), (64, 64, 32, 1, 4, 1)],
}
# The tile of the data kernel if it adds integer units, which have 64 bits.
_EXACT_TILES = {"sm_80": (32, 32, 16, 1, 8, 1)} | dict.fromkeys(("sm_90", "sm_100", "hip"), (64, 32, 16, 1, 8, 1))
# The memory that the parts of a weight gradient may take before they are added up, in bytes.
_WORKSPACE = 2**25


def extent(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    *_: object,
) -> int:
    """The largest number that kernels have to store in 32 bits."""
    return largest_index(input.shape[2:], offset.shape[2:], padding)


def forward(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    problem = _Problem(input, offset, weight, *how)
    output = input.new_empty(len(input), len(weight), *offset.shape[2:])
    if problem.depthwise:
        kernel, filters = deform_conv_forward_depthwise, weight
        configs = problem.row_configs(16 // input.itemsize)
        arguments = problem.arguments(by_points=True)
    else:
        kernel, filters = deform_conv_forward, weight.flatten(2).permute(2, 1, 0)
        configs = problem.product_configs("forward")
        arguments = problem.arguments(by_points=False) | problem.operands
    launch(
        kernel,
        input.device,
        problem.forward_programs,
        configs,
        weight=filters.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        output=output,
        **arguments,
    )
    return output


def backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, *how: Any
) -> tuple[Tensor, ...]:
    """Launch the kernels; arguments as in the schema."""
    *how, output_mask = how
    problem = _Problem(input, offset, weight, *how)
    by_input, by_offset, by_weight, by_bias, by_mask = output_mask
    rows = grad_output.flatten(2)
    grad_input = grad_offset = grad_weight = grad_bias = grad_mask = None
    if by_input or by_offset or by_mask:
        grad_input, grad_offset, grad_mask = _backward_data(problem, rows, weight, by_input, by_offset or by_mask)
    if by_weight:
        grad_weight = _backward_weight(problem, rows, weight)
    if by_bias:
        grad_bias = rows.sum((0, 2), dtype=torch.float32).to(grad_output.dtype)
    return asked_for([grad_input, grad_offset, grad_weight, grad_bias, grad_mask], output_mask, input)


def _backward_data(
    problem: "_Problem", grad_output: Tensor, weight: Tensor, by_input: bool, by_points: bool
) -> tuple[Tensor | None, ...]:
    """Compute the gradients by input, offset and mask."""
    input, offset, mask = problem.tensors

    def most() -> Tensor:
        # The bound for one column, times the number of columns that may sample one position.
        column = largest(grad_output) * largest(weight) * weight.shape[0]
        return column * (1 if mask is None else largest(mask)) * max(problem.positions * problem.taps, 1)

    size, channels = input.shape[2:], input.shape[1]
    shape = (len(input), channels, *size) if problem.planar else (len(input), *size, channels)
    grad_input = FieldGradient(input, shape, by_input, most)
    grad_offset, grad_mask = (t.new_empty(t.shape) if by_points and t is not None else None for t in (offset, mask))
    filters = weight if problem.depthwise else weight.flatten(2).permute(2, 0, 1)
    if problem.depthwise:
        configs = problem.depthwise_configs(grad_input.vector)
    else:
        configs = problem.product_configs("exact" if grad_input.exact else "data")
    launch(
        deform_conv_backward_data,
        input.device,
        lambda blocks: problem.tiles(blocks) * problem.offset_groups * problem.taps,
        configs,
        grad_output=strided(grad_output),
        weight=filters.contiguous(),
        grad_input=grad_input.sums,
        grad_offset=grad_offset,
        grad_mask=grad_mask,
        DEPTHWISE=problem.depthwise,
        PLANAR=problem.planar,
        **problem.arguments(by_points=True),
        **problem.operands,
    )
    result = grad_input.result()
    if result is not None and not problem.planar:
        result = result.movedim(-1, 1).contiguous()
    return result, grad_offset, grad_mask


def _backward_weight(problem: "_Problem", grad_output: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient by the weight in parts, each from some of the positions, which are added up in order."""
    arguments = problem.arguments(by_points=False)
    vector = 16 // weight.itemsize
    configs = problem.depthwise_configs(vector) if problem.depthwise else problem.product_configs("weight")
    splits = min(
        triton.cdiv(2 * _PROCESSORS, problem.weight_programs(configs[0].kwargs, arguments["GROUPS"])),
        _WORKSPACE // (4 * weight.numel()),
        triton.cdiv(problem.batch * problem.positions, 256),
    )
    splits = max(splits, 1)
    partial = weight.new_empty(splits, problem.taps, weight.shape[1], len(weight), dtype=torch.float32)
    launch(
        deform_conv_backward_weight,
        weight.device,
        lambda blocks: problem.weight_programs(blocks, arguments["GROUPS"]) * splits,
        configs,
        grad_output=strided(grad_output),
        partial=partial,
        batch=problem.batch,
        splits=splits,
        DEPTHWISE=problem.depthwise,
        **arguments,
        **problem.operands,
    )
    return partial.sum(0).permute(2, 1, 0).reshape(weight.shape).to(weight.dtype)


class _Problem:
    """The common arguments of all kernels of a call."""

    def __init__(
        self,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        mask: Tensor | None,
        boundary: int,
    ) -> None:
        size, out_size, kernel_size = input.shape[2:], offset.shape[2:], weight.shape[2:]
        axes = len(size)
        self.tensors = (input, offset, mask)
        self.taps = prod(kernel_size)
        self.filters, self.group_channels = weight.shape[:2]
        self.channels = input.shape[1]
        self.groups = self.channels // self.group_channels
        self.offset_groups = offset.shape[1] // (self.taps * axes)
        self.offset_channels = self.channels // self.offset_groups
        self.depthwise = self.group_channels == 1
        # Too few channels share their points to be loaded side by side.
        self.planar = self.depthwise and self.offset_channels < 8
        self.batch, self.positions = len(input), prod(out_size)

        # The input that an adjoint gives is one number, which nothing reads: it needs no layout.
        laid_out = self.planar or not any(input.stride())
        field = input if laid_out else input.movedim(1, -1).contiguous().movedim(-1, 1)
        tensors = (None if t is None else strided(t.flatten(2)) for t in (field, offset, mask))
        self._shared = {
            "inputs": Inputs(*tensors, packed(out_size)),
            "positions": self.positions,
            **dict(zip(("depth", "height", "width"), lifted(size, 1), strict=True)),
            "STEPS": steps(kernel_size, stride, padding, dilation),
            "RULE": rule(axes, boundary),
        }
        self.operands = {"PRECISION": _precision(), "OPERAND": _operand(input.dtype)}

    def arguments(self, by_points: bool) -> dict[str, Any]:
        """The arguments of all kernels; each program computes an offset group, or else a group of the weight."""
        channels, others = self.group_channels, self.offset_channels
        if self.depthwise:
            channels = others
        elif by_points:
            channels, others = others, channels
        even = channels % others == 0 or others % channels == 0
        most = max(
            (first + channels - 1) // others - first // others + 1 for first in range(0, self.channels, channels)
        )
        groups = Groups(
            self.filters, self.groups, self.group_channels, self.offset_channels, most, min(channels, others), even
        )
        return self._shared | {"GROUPS": groups}

    def tiles(self, blocks: Blocks) -> int:
        """The number of tiles of positions."""
        return self.batch * triton.cdiv(self.positions, blocks["ROWS"])

    def forward_programs(self, blocks: Blocks) -> int:
        """The number of programs of a forward kernel."""
        if self.depthwise:
            chunks = triton.cdiv(self.offset_channels, blocks["COLUMNS"] * blocks["PARTS"])
            return self.tiles(blocks) * self.offset_groups * chunks * (self.filters // self.groups)
        return self.tiles(blocks) * self.groups * triton.cdiv(self.filters // self.groups, blocks["OUTPUTS"])

    def weight_programs(self, blocks: Blocks, groups: Groups) -> int:
        """The number of programs for each part of the gradient by the weight."""
        chunks = triton.cdiv(groups.piece, blocks["COLUMNS"] * blocks["PARTS"]) * self.taps
        filters = self.filters // self.groups
        if self.depthwise:
            return chunks * self.offset_groups * filters
        return chunks * self.groups * groups.pieces * triton.cdiv(filters, blocks["OUTPUTS"])

    def row_configs(self, vector: int) -> list[Config]:
        """Candidates for the kernels without products."""
        if not self.planar:
            return row_configs(self.positions, self.batch * self.offset_groups, self.offset_channels, vector)
        rows = 1024 if target().backend == "interpreter" else 128
        return [Config({"ROWS": rows, "COLUMNS": 1, "PARTS": 1, "UNROLL": 1}, 4, 1)]

    def product_configs(self, kernel: str) -> list[Config]:
        """Candidates for a kernel with products; those that give every multiprocessor a program come first."""
        filters, piece = self.filters // self.groups, min(self.group_channels, self.offset_channels)
        configs = []
        for rows, outputs, columns, parts, warps, stages in _tiles(kernel, self.tensors[0].dtype != torch.float32):
            columns = min(columns, max(triton.next_power_of_2(piece), 16))
            blocks = {
                "ROWS": min(rows, max(triton.next_power_of_2(self.positions), 16)),
                "OUTPUTS": min(outputs, max(triton.next_power_of_2(filters), 16)),
                "COLUMNS": columns,
                "PARTS": min(parts, triton.cdiv(piece, columns)),
            }
            configs.append(Config(blocks, warps, stages))
        return sorted(configs, key=lambda config: self.forward_programs(config.kwargs) < _PROCESSORS)

    def depthwise_configs(self, vector: int) -> list[Config]:
        """Candidates for the backward kernels without products."""
        keys = ("ROWS", "COLUMNS", "PARTS")
        return [
            Config({"OUTPUTS": 16} | {key: config.kwargs[key] for key in keys}, config.num_warps, 1)
            for config in self.row_configs(vector)
        ]


def _tiles(kernel: str, half: bool) -> list[tuple[int, ...]]:
    backend, arch = target()
    if backend == "interpreter":
        return [(64, 64, 64, 1, 4, 1)]
    if backend == "hip":
        arch = "hip"
    else:
        arch = "sm_80" if int(arch) < 90 else "sm_90" if int(arch) < 100 else "sm_100"
    return [_EXACT_TILES[arch]] if kernel == "exact" else _TILES[arch, kernel, half]


def _precision() -> str:
    """The precision of products of float32 operands: as in torch's matrix products, and never lower than requested."""
    if target().backend != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _operand(dtype: torch.dtype) -> Any:
    if target().backend == "interpreter":  # whose products of bfloat16 are wrong
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
