"""Layers whose channels are divided among ranks: styles for ``parallelize_module``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import nn as layers

_COLUMNS, _ROWS = {"weight": 0, "bias": 0}, {"weight": 1}

# Every rank computes them alike. DTensor has a rule for them that torch 2.10 gets wrong.
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

DIVIDED: dict[type[nn.Module], Mapping[str, Mapping[str, int]]] = {
    layers.MSDeformAttn: {
        "value_proj": _COLUMNS,
        "sampling_offsets": _COLUMNS,
        "attention_weights": _COLUMNS,
        "output_proj": _ROWS,
    },
    layers.DCNv3: {"input_proj": _COLUMNS, "offset": _COLUMNS, "mask": _COLUMNS, "output_proj": _ROWS},
    layers.DCNv4: {"value_proj": _COLUMNS, "output_proj": _ROWS},
    **{getattr(layers, f"{kind}DeformConv{axes}d"): {"": _COLUMNS} for kind in ("", "Packed") for axes in (1, 2, 3)},
    **{
        getattr(layers, f"{kind}DeformConvTranspose{axes}d"): {"": {"weight": 1, "bias": 0}}
        for kind in ("", "Packed")
        for axes in (1, 2, 3)
    },
}
"""For each layer, by the name of a part, the axis along which a parameter is divided. All others are on every rank."""


class TensorParallel(ParallelStyle):
    """Divides the heads, groups or output channels of a deformable layer among the ranks of a mesh.

    Inputs and outputs are ordinary tensors that every rank has whole; so are the parameters that predict offsets,
    unless they belong to a head. Attention and aggregation are computed head by head, and the ranks add up what
    ``output_proj`` makes of them; of a convolution each rank computes some output channels. A number of heads that the
    ranks do not divide is computed by every rank.

    Raises:
        TypeError: the layer is not one of ``MSDeformAttn``, ``DCNv3``, ``DCNv4``, ``DeformConv*``,
            ``PackedDeformConv*``, ``DeformConvTranspose*`` and ``PackedDeformConvTranspose*``.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> mesh = torch.distributed.init_device_mesh("cuda", (8,))  # doctest: +SKIP
        >>> parallelize_module(model, mesh, deformkit.distributed.parallel_plan(model))  # doctest: +SKIP
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        divided = _divided(module)
        if divided is None:
            raise TypeError(f"{type(module).__name__} is no layer that TensorParallel divides")

        def place(name: str, part: nn.Module, mesh: DeviceMesh) -> None:
            axes = divided.get(name, {})
            for key, value in list(part.named_parameters(recurse=False)):
                placement = Shard(axes[key]) if key in axes else Replicate()
                placed = nn.Parameter(distribute_tensor(value, mesh, [placement]), value.requires_grad)
                part.register_parameter(key, placed)

        distribute_module(module, device_mesh, place)
        forward = module.forward

        def with_whole_tensors(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: _everywhere(t, device_mesh), (args, kwargs))
            with _Everywhere(device_mesh):
                output = forward(*args, **kwargs)
            return pytree.tree_map_only(DTensor, lambda t: t.full_tensor(), output)

        module.forward = with_whole_tensors  # type: ignore[method-assign]  # hooks cannot keep a mode
        return module


def parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The plan for ``parallelize_module`` that divides every deformable layer of a model by :class:`TensorParallel`.

    Args:
        model: any module.

    Returns:
        A style for the name of each layer; empty if there is none.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.PackedDeformConv2d(8, 16, 3))
        >>> list(parallel_plan(model))
        ['1']
    """
    return {name: TensorParallel() for name, layer in model.named_modules() if _divided(layer) is not None}


def _divided(module: nn.Module) -> Mapping[str, Mapping[str, int]] | None:
    return next((parts for kind, parts in DIVIDED.items() if isinstance(module, kind)), None)


def _everywhere(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


class _Everywhere(TorchFunctionMode):
    """Takes a tensor that a layer creates itself, such as the sizes of levels, as one that every rank has.

    ``implicit_replication`` does so in the forward alone; the backward then meets the same tensor, saved.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        everything = (args, kwargs or {})
        divided = any(isinstance(value, DTensor) for value in pytree.tree_leaves(everything))
        if divided and func in _CONVOLUTIONS:
            args, kwargs = pytree.tree_map_only(DTensor, self._whole, everything)
            return _everywhere(func(*args, **kwargs), self.mesh)
        if divided:
            everything = pytree.tree_map_only(Tensor, lambda t: _everywhere(t, self.mesh), everything)
        args, kwargs = everything
        return func(*args, **kwargs)

    def _whole(self, tensor: DTensor) -> Tensor:
        return tensor.redistribute(placements=[Replicate()] * self.mesh.ndim).to_local()
