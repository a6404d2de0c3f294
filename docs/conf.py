import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "deformkit"
author = "The deformkit authors"
copyright = "2026, The deformkit authors"
release = version = installed_version("deformkit")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_numpy_docstring = False
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"deformkit {release}"


def setup(app):
    # The path is set above.
    from _charts import draw

    docs = Path(__file__).parent
    app.connect("builder-inited", lambda app: draw(docs.parent / "benchmarks/results", docs / "_generated/charts"))
