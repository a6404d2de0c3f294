"""``python -m deformkit`` and the command ``deformkit``."""

import sys


def main() -> None:
    """Run the command line; ``doctor`` also without torch and without the packages of the command line."""
    doctor_alone = sys.argv[1:] == ["doctor"]
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        from . import _environment

        if doctor_alone:
            print(_environment.without_torch(error))
            sys.exit(1)
        sys.exit(f"deformkit: {_environment.torch_problem(error)}; `deformkit doctor` says more")
    try:
        from . import cli
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in ("typer", "rich"):
            raise
        if not doctor_alone:
            sys.exit(f"deformkit: the command line needs {missing}; pip install 'deformkit[cli]' brings it")
        from . import doctor

        diagnosis = doctor.diagnose()
        print(diagnosis.text)
        sys.exit(not diagnosis.healthy)
    cli.app()


if __name__ == "__main__":
    main()
