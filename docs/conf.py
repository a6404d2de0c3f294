from importlib.metadata import version as installed_version

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
