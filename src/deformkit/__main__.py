"""``python -m deformkit`` and the command ``deformkit``."""

import sys


def main() -> None:
    """Run the command line; say in one line what is missing if its extra is not installed."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"deformkit: the command line needs {missing}; pip install 'deformkit[cli]' brings it")
    cli.app()


if __name__ == "__main__":
    main()
