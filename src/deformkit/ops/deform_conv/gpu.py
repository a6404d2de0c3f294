"""Deformable convolution on a GPU: what its Triton kernels are given, and with which tiles they start."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._shape import name_of, prod
from ..gpu.launch import Config, launch, row_configs, target
from ..sample.gpu import FieldGradient, largest, lifted
from .gpu_kernels import (
    deform_conv_backward_data,
    deform_conv_backward_weight,
    deform_conv_forward,
    deform_conv_forward_depthwise,
)

# A program for each processor of a large GPU.
_PROCESSORS = 132
# Tiles of the kernels with products: rows, filters, columns, parts, warps, stages. By architecture, kernel and whether
# the operands are half; "exact" is the data kernel where it adds whole units, which are 64 bits wide. Of those tried,
# the ones that spill nothing, best first by the instructions they take.
_TILES = {
    ("sm_80", "exact", True): [(32, 32, 16, 1, 8, 1)],
    ("sm_80", "exact", False): [(32, 32, 16, 1, 8, 1)],
    ("sm_90", "exact", True): [(64, 32, 16, 1, 8, 1)],
    ("sm_90", "exact", False): [(64, 32, 16, 1, 8, 1)],
    ("sm_100", "exact", True): [(64, 32, 16, 1, 8, 1)],
    ("sm_100", "exact", False): [(64, 32, 16, 1, 8, 1)],
    ("hip", "exact", True): [(64, 32, 16, 1, 8, 1)],
    ("hip", "exact", False): [(64, 32, 16, 1, 8, 1)],
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
# How much memory the parts of a weight gradient may take before they are added up, in bytes.
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
    """The largest number that kernels have to keep in 32 bits."""
    size = input.shape[2:]
    return max(prod(size), prod(offset.shape[2:]), *(s + 2 * p for s, p in zip(size, padding, strict=True)))


def forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    boundary: int,
) -> Tensor:
    """Launch the kernel; arguments as in the schema."""
    problem = _Problem(input, offset, weight, stride, padding, dilation, mask, boundary)
    output = input.new_empty(len(input), len(weight), *offset.shape[2:])
    constants = problem.constants | {"BIASED": bias is not None}
    if problem.depthwise:
        kernel, filters, configs = deform_conv_forward_depthwise, weight, problem.row_configs(16 // input.itemsize)
        constants |= {"OFFSET_CHANNELS": problem.offset_channels}
    else:
        kernel, filters, configs = (
            deform_conv_forward,
            weight.flatten(2).permute(2, 1, 0),
            problem.product_configs("forward"),
        )
        constants |= problem.products | problem.pieces(problem.group_channels, problem.offset_channels)
    args = [
        *problem.tensors[:2],
        filters.contiguous(),
        bias if bias is None else bias.contiguous(),
        problem.tensors[2],
        output,
        *problem.numbers,
    ]
    launch(kernel, problem.forward_programs, args, constants, configs)
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    boundary: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Launch the kernels; arguments as in the schema."""
    problem = _Problem(input, offset, weight, stride, padding, dilation, mask, boundary)
    by_input, by_offset, by_weight, by_bias, by_mask = output_mask
    nothing = grad_output.new_empty(0)
    grads = dict.fromkeys(("input", "offset", "weight", "bias", "mask"), nothing)
    rows = grad_output.flatten(2)
    if by_input or by_offset or by_mask:
        found = _backward_data(problem, rows, weight, by_input, by_offset or by_mask)
        for name, grad, asked in zip(("input", "offset", "mask"), found, (by_input, by_offset, by_mask), strict=True):
            grads[name] = grad if asked else nothing
    if by_weight:
        grads["weight"] = _backward_weight(problem, rows, weight)
    if by_bias:
        grads["bias"] = rows.sum((0, 2), dtype=torch.float32).to(grad_output.dtype)
    return tuple(grads.values())


def _backward_data(
    problem: "_Problem", grad_output: Tensor, weight: Tensor, by_input: bool, by_points: bool
) -> tuple[Tensor, ...]:
    """The gradients by input, offset and mask."""
    input, offset, mask = problem.arguments

    def most() -> Tensor:
        # Of what the output's gradient gives to one column, times the columns that may read one position.
        column = largest(grad_output) * largest(weight) * weight.shape[0]
        return column * (1 if mask is None else largest(mask)) * max(problem.positions * problem.taps, 1)

    size, channels = input.shape[2:], input.shape[1]
    shape = (len(input), channels, *size) if problem.planar else (len(input), *size, channels)
    grad_input = FieldGradient(input, shape, by_input, most)
    grad_offset = offset.new_empty(offset.shape if by_points else 0)
    grad_mask = grad_offset if mask is None else mask.new_empty(mask.shape if by_points else 0)
    if problem.depthwise:
        filters = weight
        pieces = problem.pieces(problem.offset_channels, problem.offset_channels)
    else:
        filters = weight.flatten(2).permute(2, 0, 1)
        pieces = problem.pieces(problem.offset_channels, problem.group_channels)
    kernel = "exact" if grad_input.exact else "data"
    launch(
        deform_conv_backward_data,
        lambda config: problem.tiles(config) * problem.offset_groups * problem.taps,
        [grad_output, *problem.tensors[:2], filters.contiguous(), problem.tensors[2], grad_input.argument]
        + [grad_offset, grad_mask, grad_output.stride(), *problem.numbers],
        problem.constants
        | problem.products
        | pieces
        | {"DEPTHWISE": problem.depthwise, "PLANAR": problem.planar}
        | {"FIELD": by_input, "POINTS": by_points, "EXACT": grad_input.exact},
        problem.depthwise_configs(grad_input.vector) if problem.depthwise else problem.product_configs(kernel),
    )
    result = grad_input.result()
    return result.movedim(-1, 1).contiguous() if by_input and not problem.planar else result, grad_offset, grad_mask


def _backward_weight(problem: "_Problem", grad_output: Tensor, weight: Tensor) -> Tensor:
    """The gradient by the weight: parts of it, each from some of the positions, added up in order."""
    if problem.depthwise:
        pieces = problem.pieces(problem.offset_channels, problem.offset_channels)
    else:
        pieces = problem.pieces(problem.group_channels, problem.offset_channels)
    vector = 16 // problem.arguments[0].itemsize
    configs = problem.depthwise_configs(vector) if problem.depthwise else problem.product_configs("weight")
    each = problem.weight_programs(configs[0], pieces)
    splits = min(
        triton.cdiv(2 * _PROCESSORS, each),
        _WORKSPACE // (4 * weight.numel()),
        triton.cdiv(problem.batch * problem.positions, 256),
    )
    splits = max(splits, 1)
    partial = weight.new_empty(splits, problem.taps, weight.shape[1], len(weight), dtype=torch.float32)
    input, offset, mask = problem.tensors
    launch(
        deform_conv_backward_weight,
        lambda config: problem.weight_programs(config, pieces) * splits,
        [grad_output, input, offset, mask, partial, grad_output.stride(), *problem.numbers, problem.batch, splits],
        problem.constants | problem.products | pieces | {"DEPTHWISE": problem.depthwise},
        configs,
    )
    return partial.sum(0).permute(2, 1, 0).reshape(weight.shape).to(weight.dtype)


class _Problem:
    """What all kernels of a call have in common."""

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
        self.arguments = (input, offset, mask)
        self.taps = prod(kernel_size)
        self.filters, self.group_channels = weight.shape[:2]
        self.channels = input.shape[1]
        self.groups = self.channels // self.group_channels
        self.offset_groups = offset.shape[1] // (self.taps * axes)
        self.offset_channels = self.channels // self.offset_groups
        self.depthwise = self.group_channels == 1
        # Too few channels share their points to be read side by side.
        self.planar = self.depthwise and self.offset_channels < 8
        self.batch, self.positions = len(input), prod(out_size)
        self.half = input.dtype != torch.float32

        field = input if self.planar else input.movedim(1, -1).contiguous().movedim(-1, 1)
        self.tensors = [t if t is None else t.flatten(2) for t in (field, offset, mask)]
        strides = [(0, 0, 0) if t is None else t.stride() for t in self.tensors]
        sizes = [*lifted(size, 1), *lifted(out_size, 1)[1:]]
        self.numbers = [*strides, self.positions, *sizes]
        self.constants = {
            "FILTERS": self.filters,
            "GROUPS": self.groups,
            "TAPS": self.taps,
            "KERNEL": lifted(kernel_size, 1),
            "STRIDE": lifted(stride, 1),
            "PADDING": lifted(padding, 0),
            "DILATION": lifted(dilation, 1),
            "AXES": axes,
            "BORDER": name_of("boundary", boundary) == "border",
            "MODULATED": mask is not None,
        }
        self.products = {"PRECISION": _precision(), "OPERAND": _operand(input.dtype)}

    def pieces(self, channels: int, others: int) -> dict[str, Any]:
        """How groups of ``channels`` channels fall into pieces, each of which is in one group of the other kind."""
        even = channels % others == 0 or others % channels == 0
        most = max(
            (first + channels - 1) // others - first // others + 1 for first in range(0, self.channels, channels)
        )
        constants = {"PIECES": most, "PIECE": min(channels, others), "EVEN": even}
        return constants | {"GROUP_CHANNELS": self.group_channels, "OFFSET_CHANNELS": self.offset_channels}

    def tiles(self, config: Config) -> int:
        """How many tiles of positions there are."""
        return self.batch * triton.cdiv(self.positions, config.blocks["ROWS"])

    def forward_programs(self, config: Config) -> int:
        """How many programs a forward kernel has."""
        tiles, columns = (
            self.tiles(config),
            config.blocks["COLUMNS"] * config.blocks["PARTS"],
        )
        if self.depthwise:
            copies = self.filters // self.groups
            return tiles * self.offset_groups * triton.cdiv(self.offset_channels, columns) * copies
        return tiles * self._products(config)

    def weight_programs(self, config: Config, pieces: dict[str, Any]) -> int:
        """How many programs each part of the gradient by the weight has."""
        chunks = triton.cdiv(pieces["PIECE"], config.blocks["COLUMNS"] * config.blocks["PARTS"]) * self.taps
        filters = self.filters // self.groups
        if self.depthwise:
            return chunks * self.offset_groups * filters
        return chunks * self.groups * pieces["PIECES"] * triton.cdiv(filters, config.blocks["OUTPUTS"])

    def row_configs(self, vector: int) -> list[Config]:
        """Candidates for the kernels without products."""
        if not self.planar:
            return row_configs(self.positions, self.batch * self.offset_groups, self.offset_channels, vector)
        rows = 1024 if target().backend == "interpreter" else 128
        return [Config({"ROWS": rows, "COLUMNS": 1, "PARTS": 1, "UNROLL": 1})]

    def product_configs(self, kernel: str) -> list[Config]:
        """Candidates for a kernel with products, those first that give every processor a program."""
        filters, piece = self.filters // self.groups, min(self.group_channels, self.offset_channels)
        if target().backend == "interpreter":
            table = [(64, 64, 64, 1, 4, 1)]
        else:
            table = _TILES[_architecture(), kernel, self.half]
        configs = []
        for rows, outputs, columns, parts, warps, stages in table:
            columns = min(columns, max(triton.next_power_of_2(piece), 16))
            blocks = {
                "ROWS": min(rows, max(triton.next_power_of_2(self.positions), 16)),
                "OUTPUTS": min(outputs, max(triton.next_power_of_2(filters), 16)),
                "COLUMNS": columns,
                "PARTS": min(parts, triton.cdiv(piece, columns)),
            }
            configs.append(Config(blocks, warps, stages))
        return sorted(configs, key=lambda config: self.tiles(config) * self._products(config) < _PROCESSORS)

    def _products(self, config: Config) -> int:
        """How many programs a forward kernel has for each tile of positions."""
        return self.groups * triton.cdiv(self.filters // self.groups, config.blocks["OUTPUTS"])

    def depthwise_configs(self, vector: int) -> list[Config]:
        """Candidates for the backward kernels where there are no products."""
        keys = ("ROWS", "COLUMNS", "PARTS")
        return [
            Config({"OUTPUTS": 16} | {key: config.blocks[key] for key in keys}, config.num_warps)
            for config in self.row_configs(vector)
        ]


def _architecture() -> str:
    backend, arch = target()
    if backend == "hip":
        return "hip"
    return "sm_80" if int(arch) < 90 else "sm_90" if int(arch) < 100 else "sm_100"


def _precision() -> str:
    """How float32 operands are multiplied: as torch's matrix products are, but never less exactly than asked."""
    if target().backend != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _operand(dtype: torch.dtype) -> Any:
    if target().backend == "interpreter":  # whose products of bfloat16 are wrong
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
