"""Shows the pictures that an example of the gallery saves, below the block that saves them."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.time()


def _get_sg_image_scraper() -> Callable[..., str]:
    # sphinx-gallery looks for this name. Its own scraper only knows the figures of pyplot, and those of
    # deformkit.viz are not among them.
    return _saved


def _saved(block: Any, variables: dict[str, Any], configuration: dict[str, Any], **options: Any) -> str:
    from matplotlib import pyplot
    from sphinx_gallery.scrapers import figure_rst

    pyplot.close("all")
    # An example runs in its own folder.
    files = [file for file in Path(variables["src_file"]).parent.glob("*.png") if file.stat().st_mtime >= START]
    shown = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        place = next(variables["image_path_iterator"])
        shutil.move(file, place)
        shown.append(figure_rst([place], configuration["src_dir"], file.stem.replace("_", " ")))
    return "".join(shown)
