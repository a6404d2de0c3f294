"""Fetch the headers of the oldest torch that deformkit serves: ``python packaging/oldest_headers.py FOLDER``.

They come out of torch's wheel for macOS, a tenth of the size of the others; the headers that the kernels include are
the same in all of them. What stays on disk is ``FOLDER/include``, and nothing is installed.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OLDEST_TORCH = "2.10.0"


def fetch(folder: Path) -> None:
    """Download the wheel with pip, and take the headers out of it."""
    with tempfile.TemporaryDirectory() as scratch:
        options = [
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--platform=macosx_11_0_arm64",
            "--python-version=3.11",
        ]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", scratch, f"torch=={OLDEST_TORCH}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("torch/include/torch/") and not name.endswith("/"):
                    target = folder / Path(name).relative_to("torch")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
