"""Models to plan for, by name or out of a program of the user's. They are built on the meta device."""

from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import DCNv3, MSDeformAttn, PackedDeformConv3d

Made = tuple[nn.Module, tuple[Any, ...]]


class _AttentionLayer(nn.Module):
    """A layer of Deformable DETR: of the encoder, or with self-attention of the decoder."""

    def __init__(self, width: int, is_decoder: bool) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, 8, batch_first=True) if is_decoder else None
        self.attention = MSDeformAttn(width, n_levels=4, n_heads=8, n_points=4)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if is_decoder else 2))

    def forward(self, query: Tensor, points: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        if self.self_attn is not None:
            query = self.norms[2](query + self.self_attn(query, query, query, need_weights=False)[0])
        query = self.norms[0](query + self.attention(query, points, memory, shapes))
        return self.norms[1](query + self.feed_forward(query))


class _Transformer(nn.Module):
    def __init__(self, width: int = 256, layers: int = 6, queries: int = 300) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(_AttentionLayer(width, False) for _ in range(layers))
        self.decoder = nn.ModuleList(_AttentionLayer(width, True) for _ in range(layers))
        self.query = nn.Parameter(torch.empty(queries, width))
        self.shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]

    def forward(self, memory: Tensor) -> Tensor:
        points = memory.new_empty(len(memory), memory.shape[1], 4, 2)
        for layer in self.encoder:
            memory = layer(memory, points, memory, self.shapes)
        query = self.query.expand(len(memory), -1, -1)
        for layer in self.decoder:
            query = layer(query, points[:, : query.shape[1]], memory, self.shapes)
        return query


def deformable_detr(batch: int) -> Made:
    """The transformer of Deformable DETR: 6 + 6 layers over the features of images of 800x1333 pixels."""
    model = _Transformer()
    return model, (torch.empty(batch, sum(h * w for h, w in model.shapes), 256, requires_grad=True),)


class _DCNv3Block(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dcn = DCNv3(width, group=groups)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, input: Tensor) -> Tensor:
        input = input + self.dcn(self.norms[0](input))
        return input + self.mlp(self.norms[1](input))


class _Backbone(nn.Module):
    def __init__(self, depths: tuple[int, ...] = (4, 4, 18, 4), width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.downs = nn.ModuleList(nn.Conv2d(width << i, width << (i + 1), 2, 2) for i in range(len(depths) - 1))
        self.blocks = nn.ModuleList(
            _DCNv3Block(width << i, (width << i) // 16) for i, depth in enumerate(depths) for _ in range(depth)
        )
        self.depths = depths

    def forward(self, images: Tensor) -> Tensor:
        features, blocks = self.stem(images), iter(self.blocks)
        for i, depth in enumerate(self.depths):
            if i:
                features = self.downs[i - 1](features)
            features = features.movedim(1, -1)
            for _ in range(depth):
                features = next(blocks)(features)
            features = features.movedim(-1, 1)
        return features


def internimage(batch: int) -> Made:
    """A backbone of DCNv3 in the sizes of InternImage-T: 4, 4, 18, 4 blocks, width 64, images of 224x224 pixels."""
    return _Backbone(), (torch.empty(batch, 3, 224, 224),)


class _UNet3d(nn.Module):
    def __init__(self, width: int = 32, levels: int = 4) -> None:
        super().__init__()
        widths = [width << i for i in range(levels)]

        def block(before: int, after: int, is_deformable: bool) -> nn.Sequential:
            second = PackedDeformConv3d if is_deformable else nn.Conv3d
            first = nn.Conv3d(before, after, 3, padding=1)
            return nn.Sequential(
                first, nn.GroupNorm(8, after), nn.ReLU(), second(after, after, 3, padding=1), nn.ReLU()
            )

        self.downs = nn.ModuleList(block(widths[max(i - 1, 0)] if i else 1, w, i > 1) for i, w in enumerate(widths))
        self.ups = nn.ModuleList(block(3 * w, w, False) for w in widths[-2::-1])
        self.head = nn.Conv3d(width, 3, 1)

    def forward(self, volumes: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for i, down in enumerate(self.downs):
            volumes = down(F.avg_pool3d(volumes, 2) if i else volumes)
            kept.append(volumes)
        for up, fine in zip(self.ups, kept[-2::-1], strict=True):
            volumes = up(torch.cat([fine, F.interpolate(volumes, scale_factor=2)], 1))
        return self.head(volumes)


def unet3d(batch: int) -> Made:
    """A 3-D U-Net of four levels, whose two coarsest are deformable, for volumes of 128x128x128 voxels."""
    return _UNet3d(), (torch.empty(batch, 1, 128, 128, 128),)


MODELS: dict[str, Callable[[int], Made]] = {
    "deformable-detr": deformable_detr,
    "internimage": internimage,
    "unet3d": unet3d,
}


def made(name: str, batch: int) -> Made:
    """A model and its inputs without values.

    Args:
        name: one of ``MODELS``, or ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``, where the function takes a number of
            samples and returns a model and a tuple of inputs.
        batch: the number of samples.

    Raises:
        ValueError: there is no such model.
    """
    function = MODELS.get(name)
    if function is None:
        place, colon, attribute = name.rpartition(":")
        if not colon:
            raise ValueError(f"{name!r} is none of {', '.join(MODELS)}, and not FILE.py:FUNCTION or MODULE:FUNCTION")
        function = getattr(_module(place, name), attribute, None)
        if not callable(function):
            raise ValueError(f"{name!r}: there is no function {attribute!r} in {place}")
    with torch.device("meta"):
        model, inputs = function(batch)
    return model, tuple(inputs)


def _module(place: str, name: str) -> Any:
    if not place.endswith(".py"):
        try:
            return import_module(place)
        except ImportError as error:
            raise ValueError(f"{name!r}: {error}") from None
    if not Path(place).is_file():
        raise ValueError(f"{name!r}: there is no file {place}")
    import sys

    # As if the file were run: it may import its neighbours.
    sys.path.insert(0, str(Path(place).resolve().parent))
    spec = util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
