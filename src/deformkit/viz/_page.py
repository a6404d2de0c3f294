"""The page of ``Sampling.html``: the data of all layers, and plotly, in one file."""

import json
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import torch
from plotly.offline import get_plotlyjs
from torch import Tensor

from ._collect import Layer


def write(path: Path, layers: Sequence[Layer], backgrounds: Sequence[Tensor | None], row: int, most: int) -> Path:
    """Write the page; ``backgrounds [C, *S]`` belong to the layers one by one."""
    distinct: list[Tensor] = []
    indices: list[int | None] = []
    for background in backgrounds:
        if background is None:
            indices.append(None)
            continue
        same = [i for i, kept in enumerate(distinct) if torch.equal(kept, background)]
        if not same:
            distinct.append(background)
        indices.append(same[0] if same else len(distinct) - 1)
    data = {
        "layers": [
            _layer(layer, None if index is None else distinct[index], index, row, most)
            for layer, index in zip(layers, indices, strict=True)
        ],
        "backgrounds": [_background(background) for background in distinct],
    }
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    # A name of a module could hold "</script>".
    text = json.dumps(data).replace("<", "\\u003c")
    page = page.replace("/*DATA*/null", text).replace("/*PLOTLY*/", get_plotlyjs())
    path.write_text(page, encoding="utf-8")
    return path


def _layer(layer: Layer, background: Tensor | None, index: int | None, row: int, most: int) -> dict[str, Any]:
    extent = layer.sizes[0] if background is None else tuple(background.shape[1:])
    # Of RoI pooling, the RoIs of the image.
    rows = torch.tensor([row]) if layer.kind != "deform_roi_pool" else (layer.images == row).nonzero().flatten()
    shape = (len(rows), *layer.out)
    kept = _spread(shape, most)
    places = torch.unravel_index(kept, tuple(max(n, 1) for n in shape))
    names = torch.stack(places[1:], -1).tolist() if len(kept) else []
    if layer.kind == "deform_roi_pool":
        chosen = rows[places[0]].tolist()
        labels = [f"RoI {roi}, bin {', '.join(map(str, name))}" for roi, name in zip(chosen, names, strict=True)]
    else:
        labels = [", ".join(map(str, name)) for name in names]
    groups, samples = layer.weights.shape[-2:]
    axes = layer.axes
    return {
        "title": str(layer),
        "axes": axes,
        "extent": extent,
        "shape": [groups, samples],
        "levels": layer.levels.tolist(),
        "names": labels,
        "background": index,
        "anchors": _floats(layer.anchors_on(extent)[rows].reshape(-1, axes)[kept]),
        "positions": _floats(layer.on(extent)[rows].reshape(-1, groups * samples * axes)[kept]),
        "weights": _floats(layer.weights[rows].reshape(-1, groups * samples)[kept]),
    }


def _spread(shape: Sequence[int], most: int) -> Tensor:
    """Indices into the flattened ``shape``: all, or every s-th along each axis so that at most ``most`` are left."""
    step = 1
    while prod(-(-n // step) for n in shape) > most:
        step += 1
    index = torch.arange(prod(shape)).reshape(tuple(shape))
    return index[tuple(slice(None, None, step) for _ in shape)].flatten()


def _background(values: Tensor) -> dict[str, Any]:
    axes = values.dim() - 1
    if axes == 1:
        return {"kind": "wave", "values": _floats(values[0])}
    low, high = values.min(), values.max()
    pixels = ((values - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    if axes == 3:
        return {"kind": "volume", "values": b64encode(pixels[0].contiguous().numpy().tobytes()).decode()}
    return {"kind": "image", "values": _png(pixels)}


def _png(pixels: Tensor) -> str:
    """``[C, H, W]`` bytes as a data URL: three channels in colour, of any other number the first."""
    from io import BytesIO

    from matplotlib.image import imsave

    shown = pixels.movedim(0, -1) if pixels.shape[0] == 3 else pixels[0]
    file = BytesIO()
    imsave(file, shown.numpy(), cmap="gray", format="png", vmin=0, vmax=255)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _floats(values: Tensor) -> str:
    return b64encode(values.float().contiguous().numpy().tobytes()).decode()
