"""The public function ``sampling`` and what it returns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..ops._shape import check_choice, check_tensor
from ._collect import Layer, collect

if TYPE_CHECKING:
    from matplotlib.figure import Figure

What = Literal["position", "offsets", "attention", "receptive_field"]


@dataclass(frozen=True)
class Sampling:
    """What the deformable layers of a model sampled in one forward pass; made by :func:`sampling`.

    Iterating, ``len`` and an index go over :attr:`layers`; a string index gives the layer of that name. ``print`` shows
    one line per layer.
    """

    layers: tuple[Layer, ...]
    """One :class:`Layer` per call of a deformable operator, in the order of the calls."""
    model: nn.Module = field(repr=False)
    """The model that was run."""
    inputs: tuple[Any, ...] = field(repr=False)
    """Its positional arguments."""
    keywords: dict[str, Any] = field(repr=False)
    """Its keyword arguments."""

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int | str) -> Layer:
        if not self.layers:
            raise IndexError("the model has no deformable layer")
        if isinstance(layer, int):
            if not -len(self.layers) <= layer < len(self.layers):
                raise IndexError(f"layer is {layer}; there are {len(self.layers)} layers")
            return self.layers[layer]
        for found in self.layers:
            if found.name == layer:
                return found
        names = ", ".join(repr(found.name) for found in self.layers)
        raise KeyError(f"layer is {layer!r}; the layers are {names}")

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))

    def plot(
        self,
        what: What = "position",
        layer: int | str = -1,
        at: int | Sequence[int] | None = None,
        *,
        row: int = 0,
        image: Tensor | None = None,
    ) -> "Figure":
        """Draw a layer's samples over the input: an image, a waveform (1-D) or slices of a volume (3-D).

        Args:
            what: ``"position"``: the samples of one output position, larger where their weight is. ``"offsets"``: an
                arrow from each output position to the weighted mean of its samples. ``"attention"``: the samples of one
                output position, one panel per level and head (or offset group). ``"receptive_field"``: the absolute
                gradient of the layer's output at one position with respect to the model's input, summed over channels,
                through all layers before it.
            layer: the index or the name of the layer.
            at: the output position, one number per axis of ``*out``. Default: the middle.
            row: the row of the batch, or the RoI.
            image: ``[C, *S]`` or ``[*S]`` to draw over. Default: the model's first floating-point input with N spatial
                axes, if there is one.

        Returns:
            A :class:`matplotlib.figure.Figure`; ``figure.savefig(path)`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
            IndexError: there is no such layer.
            KeyError: there is no layer of that name.
            TypeError: ``image`` is not a tensor.
            ValueError: an argument does not fit the layer, by name.
        """
        _needs("matplotlib")
        from . import _figures

        check_choice("what", what, ("position", "offsets", "attention", "receptive_field"))
        chosen = self[layer]
        position = _checked_position(chosen, at, row)
        background = self._background(chosen, row, image)
        if what == "receptive_field":
            return _figures.receptive_field(chosen, self.receptive_field(layer, at, row=row), position, row, background)
        if what == "offsets":
            return _figures.offsets(chosen, row, background, position)
        draw = _figures.position if what == "position" else _figures.attention
        return draw(chosen, position, row, background)

    def html(self, path: str | Path, *, row: int = 0, image: Tensor | None = None, most: int = 4096) -> Path:
        """Write one self-contained page in which moving over an output position draws its samples.

        The page contains plotly and needs no network. It shows one layer at a time, with a choice of the layer and of
        the head (or offset group). Samples of a volume are drawn over the slice of their output position.

        Args:
            path: the file to write.
            row: the row of the batch; of RoI pooling, the RoIs of that image are shown.
            image: as in :meth:`plot`.
            most: the most output positions per layer; of more, evenly spaced ones are shown.

        Returns:
            The path of the file.

        Raises:
            ImportError: plotly or matplotlib is not installed.
            IndexError: the model has no deformable layer.
            ValueError: ``row``, ``image`` or ``most`` does not fit, by name.
        """
        # The image of the page is encoded by matplotlib.
        _needs("plotly", "matplotlib")
        from . import _page

        if most < 1:
            raise ValueError(f"most is {most}; it must be at least 1")
        if not self.layers:
            raise IndexError("the model has no deformable layer")
        for layer in self.layers:
            if layer.kind != "deform_roi_pool":
                _check_row(layer, row)
        backgrounds = [self._background(layer, row, image, by_image=True) for layer in self.layers]
        return _page.write(Path(path), self.layers, backgrounds, row, most)

    def receptive_field(self, layer: int | str = -1, at: int | Sequence[int] | None = None, *, row: int = 0) -> Tensor:
        """The effective receptive field of an output position, through all layers before it.

        ``field[s] = sum over c of |d (sum over f of output[f, at]) / d input[c, s]|``

        Args:
            layer: the index or the name of the layer.
            at: the output position. Default: the middle.
            row: the row of the batch.

        Returns:
            ``[*S]``: nonnegative, of the spatial size of the model's first floating-point input.

        Raises:
            IndexError: there is no such layer.
            KeyError: there is no layer of that name.
            ValueError: an argument does not fit the layer, or the output of its module is not the operator's.

        Paper: Understanding the Effective Receptive Field in Deep Convolutional Neural Networks,
        https://arxiv.org/abs/1701.04128.
        """
        chosen = self[layer]
        position = _checked_position(chosen, at, row)
        source = self._source(chosen)
        if source is None:
            raise ValueError(f"the model has no floating-point input with {chosen.axes} spatial axes")
        outputs: list[Any] = []
        calls = [found for found in self.layers if found.name == chosen.name]
        which = next(i for i, found in enumerate(calls) if found is chosen)
        module = self.model.get_submodule(chosen.name)
        handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
        leaf = source.detach().clone().requires_grad_()
        swap = {id(source): leaf}
        try:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                self.model(
                    *(swap.get(id(v), v) for v in self.inputs),
                    **{name: swap.get(id(v), v) for name, v in self.keywords.items()},
                )
        finally:
            handle.remove()
        tensors = [v for v in tree_leaves(outputs[min(which, len(outputs) - 1)]) if isinstance(v, Tensor)]
        value = _at_position(chosen, tensors[0], position, row)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return _channels_first(chosen, gradient)[int(chosen.images[row])].float().abs().sum(0).cpu()

    def _source(self, layer: Layer) -> Tensor | None:
        """The model's first floating-point input with a layer's number of spatial axes, ``[B, C, *S]``."""
        for value in (*self.inputs, *self.keywords.values()):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() != layer.axes + 2:
                continue
            # Reference points may have as many axes as an image, but an image is no smaller than its feature levels.
            smaller = any(n < level for n, level in zip(value.shape[2:], layer.sizes[0], strict=True))
            if layer.kind != "ms_deform_attn" or not smaller:
                return value
        return None

    def _background(self, layer: Layer, row: int, image: Tensor | None, by_image: bool = False) -> Tensor | None:
        """What is drawn below the samples, ``[C, *S]``."""
        axes = layer.axes
        if image is not None:
            check_tensor("image", image)
            if image.dim() not in (axes, axes + 1):
                raise ValueError(f"image has shape {list(image.shape)}; it must have {axes} axes, or {axes + 1}")
            return (image if image.dim() > axes else image.unsqueeze(0)).detach().cpu().float()
        source = self._source(layer)
        if source is None:
            return None
        index = row if by_image else int(layer.images[row])
        return _channels_first(layer, source)[index].detach().cpu().float()


def sampling(model: nn.Module, *inputs: Any, **keywords: Any) -> Sampling:
    """Run a model once and collect where each of its deformable layers reads its input, and with which weights.

    This covers the layers and functions of deformkit and everything that :func:`deformkit.patch` handles
    (transformers, torchvision, mmcv and others), whether the model is patched or not: a model that is not patched is
    patched for the time of the call.

    The model runs once, eagerly and without gradients, in the mode (training or evaluation) that it is in.

    Args:
        model: the module to run.
        inputs: its positional arguments.
        keywords: its keyword arguments.

    Returns:
        A :class:`Sampling`: one :class:`Layer` per call of a deformable operator, with ``.plot(...)`` and
        ``.html(path)``.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch
        >>> from deformkit.nn import PackedDeformConv2d
        >>> found = sampling(PackedDeformConv2d(8, 16, 3, padding=1), torch.randn(2, 8, 20, 30))
        >>> print(found)
        (model): deform_conv, 20x30 positions x 1 x 9 samples of 20x30
        >>> found[0].positions.shape
        torch.Size([2, 20, 30, 1, 9, 2])
        >>> found[0].positions[0, 5, 7, 0, 4]
        tensor([5., 7.])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    with torch.no_grad():
        layers = collect(model, lambda: model(*inputs, **keywords))
    return Sampling(tuple(layers), model, inputs, keywords)


def _channels_first(layer: Layer, source: Tensor) -> Tensor:
    """The model's input as ``[B, C, *S]``: a layer of aggregation that is run by itself has channels last."""
    size = torch.Size(layer.sizes[0])
    last = layer.kind == "deform_aggregate" and source.shape[1:-1] == size and source.shape[2:] != size
    return source.movedim(-1, 1) if last else source


def _needs(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is not None:
            continue
        raise ImportError(f"deformkit.viz needs {package}; pip install 'deformkit[viz]' brings it")


def _check_row(layer: Layer, row: int) -> None:
    if not 0 <= row < len(layer.positions):
        raise ValueError(f"row is {row}; layer {layer.name!r} has {len(layer.positions)} rows")


def _checked_position(layer: Layer, at: int | Sequence[int] | None, row: int) -> tuple[int, ...]:
    _check_row(layer, row)
    out = layer.out
    if 0 in out:
        raise ValueError(f"layer {layer.name!r} has no output positions")
    position = tuple(n // 2 for n in out) if at is None else (at,) if isinstance(at, int) else tuple(at)
    if len(position) != len(out) or not all(0 <= p < n for p, n in zip(position, out, strict=True)):
        expected = " x ".join(f"0..{n - 1}" for n in out)
        raise ValueError(f"at is {at!r}; layer {layer.name!r} has output positions {expected}")
    return position


def _at_position(layer: Layer, output: Tensor, position: tuple[int, ...], row: int) -> Tensor:
    """The channels of a layer's output at one position."""
    rest = list(output.shape[1:])
    if rest[1:] == list(layer.out) and layer.kind != "ms_deform_attn":
        return output[row].movedim(0, -1)[position]
    if rest[: len(layer.out)] == list(layer.out):
        return output[(row, *position)]
    raise ValueError(
        f"layer {layer.name!r} returns shape {list(output.shape)}; the receptive field needs one output per position, "
        f"and there are {list(layer.out)}"
    )
