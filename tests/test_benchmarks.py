"""The benchmarks run; how fast is another matter."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "benchmarks" / "run.py"


@pytest.mark.slow
@pytest.mark.parametrize("section", ["conv", "half", "memory", "growth", "overhead"])
def test_section(section: str) -> None:
    if section == "memory" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory is read from /proc")
    program = [sys.executable, str(RUN), section, "--tiny", "--case", "1d", "--rivals", "plain,reference"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| 1d" in done.stdout
    assert "wrong" not in done.stdout and "failed" not in done.stdout
