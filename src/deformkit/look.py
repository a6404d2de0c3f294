"""``deformkit look``: where a small network with deformable layers looks in a picture of one's own."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from . import demo

# The picture is shown in more detail than the network sees it.
_SHOWN = 640
_FORMATS = (".html", ".htm")


def look(
    image: Annotated[Path, typer.Argument(help="The picture: PNG, JPEG or another format that Pillow reads.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write, .html; a .png goes beside it. Default: IMAGE_look.html, here."),
    ] = None,
    size: Annotated[
        int, typer.Option(min=16, max=512, help="The longer side of the picture that the network sees, in pixels.")
    ] = demo.CANVAS,
    epochs: Annotated[int, typer.Option(min=1, help="How often each training image is seen.")] = 10,
) -> None:
    """Train the demo's deformable network on digits, and draw where it looks in IMAGE.

    Writes an interactive page, in which moving over a position draws its samples, and a picture of the effective
    receptive field.
    """
    try:
        _look(image, out or Path(f"{image.stem}_look.html"), size, epochs)
    except (OSError, ValueError) as error:
        raise SystemExit(f"deformkit: {error}") from None


def _look(image: Path, out: Path, size: int, epochs: int) -> None:
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("plotly", "plotly")):
        if find_spec(module) is None:
            raise SystemExit(f"deformkit: look needs {package}; pip install 'deformkit[demo]' brings it")
    if out.suffix not in _FORMATS or not out.absolute().parent.is_dir():
        raise ValueError(f"out is {str(out)!r}; it must be an .html file in a folder that exists")
    picture = out.with_suffix(".png")
    if picture.absolute() == image.absolute():
        raise ValueError(f"out is {str(out)!r}; the picture beside it would replace {str(image)!r}")
    shown = load(image)

    from rich.console import Console

    from . import viz

    console = Console()
    model = _trained(epochs, console)
    seen = as_digit(shown, size)
    found = viz.sampling(model, seen.unsqueeze(0))
    looked = demo.look(model, seen, label=-1)
    # The output position of the last layer that speaks most for the predicted digit.
    anchors = found[-1].anchors_on(seen.shape[1:])[0]
    nearest = int((anchors - looked.position).norm(dim=-1).argmin())
    at = [int(n) for n in torch.unravel_index(torch.tensor(nearest), found[-1].out)]
    found.plot("receptive_field", at=at, image=shown).savefig(picture)
    found.html(out, image=shown)
    console.print(f"Of the ten digits, the network takes it for a {looked.predicted}.")
    console.print(f"Move over the positions: {out}", soft_wrap=True)
    console.print(f"The receptive field of output position {', '.join(map(str, at))}: {picture}", soft_wrap=True)


def load(path: Path) -> Tensor:
    """A picture as ``[3, H, W]`` in 0..1, upright, its longer side at most 640 pixels.

    Raises:
        ValueError: the file cannot be read as a picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGBA")
    except FileNotFoundError:
        raise ValueError(f"image is {str(path)!r}; there is no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image is {str(path)!r}; it cannot be read as a picture ({error})") from None
    # What is transparent is shown on white, as a browser does.
    opaque = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    opaque.thumbnail((_SHOWN, _SHOWN))
    pixels = torch.frombuffer(bytearray(opaque.tobytes()), dtype=torch.uint8)
    return pixels.reshape(opaque.height, opaque.width, 3).movedim(-1, 0) / 255


def as_digit(picture: Tensor, size: int) -> Tensor:
    """``picture [3, H, W]`` as the network was trained: grey, ``[1, h, w]``, bright strokes on a dark ground.

    The longer side has ``size`` pixels. A picture with a bright frame is taken for ink on paper and inverted.
    """
    grey = picture.mean(0, keepdim=True)
    frame = torch.cat([grey[0, 0], grey[0, -1], grey[0, :, 0], grey[0, :, -1]])
    if frame.mean() > 0.5:
        grey = 1 - grey
    longer = max(grey.shape[1:])
    target = [max(round(n * size / longer), 1) for n in grey.shape[1:]]
    return F.interpolate(grey.unsqueeze(0), target, mode="bilinear", antialias=True)[0]


def _trained(epochs: int, console: Any) -> torch.nn.Sequential:
    from ._progress import training

    data = demo.load_digits(0)
    steps = epochs * (len(data.train_images) // demo.BATCH)
    with torch.random.fork_rng(devices=[]), training(console) as begin:
        torch.manual_seed(0)
        result = demo.Result("deformable", demo.network(True))
        demo.train(result, data, 0, steps, begin("training on digits", steps))
    return result.network.eval()
