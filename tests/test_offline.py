"""Every Triton kernel is compiled for GPUs that need not be present, and compared with the saved table of resources."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from deformkit.ops._operator import operators

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "offline.json").read_text())["rows"]


def run(*program: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *program], cwd=BENCHMARKS, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_kernels_are_as_they_should_be_and_no_worse_than_saved() -> None:
    # Every case for one target; one operator in the other dtypes, and two for the other targets. All is compiled where
    # the table is saved.
    chosen = r" float16 sm_90|2d encoder \S+ sm_90$|2d (256x56x84|encoder) float16 \S+$"
    done = run("offline.py", "--check", "--only", chosen)
    assert done.returncode == 0, done.stderr


def test_every_operator_is_saved_for_every_target_and_dtype() -> None:
    forward = [name for name, operator in operators.items() if operator.gpu and not name.endswith("_backward")]
    saved = {(row["operator"], row["target"], row["dtype"]) for row in ROWS}
    assert saved == {
        (name, target, dtype)
        for name in forward
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
        for dtype in ("float32", "float16", "bfloat16")
    }


SOUND = {
    **{"operator": "deform_conv", "case": "2d", "dtype": "float16", "deterministic": False, "target": "sm_90"},
    **{"kernel": "deform_conv_backward", "registers": 100, "instructions": 900, "spilled": 0},
    **{"atomics": {"REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 16}, "matrix": {"HGMMA.64x64x16.F32": 4}},
}
CHANGES: list[tuple[dict[str, object], str]] = [
    ({"spilled": 8}, "spills 8"),
    ({"instructions": 16}, "16 instructions, which cannot be all"),
    ({"registers": 200}, "200 registers, up from 100"),
    ({"atomics": {"REDG.E.ADD.F32.FTZ.RN.STRONG.GPU": 16}}, "adds 1 numbers at once instead of 4"),
    ({"matrix": {}}, "no matrix instructions"),
    ({"dtype": "int8"}, "not in offline.json"),
]


def test_wrong_results_are_found() -> None:
    rows = [{**SOUND, **change} for change, _ in CHANGES]
    done = run("-c", f"import offline; print(*offline.problems({[SOUND, *rows]!r}, [{SOUND!r}]), sep='\\n')")
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) == len(CHANGES)
    for line, (_, problem) in zip(found, CHANGES, strict=True):
        assert problem in line


def test_the_pages_are_those_of_the_results() -> None:
    done = run("-c", "import gpu_page; assert all(p.read_text() == t for p, t in gpu_page.pages().items())")
    assert done.returncode == 0, done.stderr


def test_floors_of_a_known_case() -> None:
    """2 x 100 x 167 positions of 128 channels and 9 taps, counted by hand."""
    program = """
import floors, gpu_cases
case = next(case for case in gpu_cases.CASES if case.name == "R50 c3")
positions = 2 * 100 * 167
forward, both = floors.forward(case, "bfloat16"), floors.both(case, "bfloat16")
assert forward.matrix == 2 * positions * 128 * 128 * 9
assert forward.bytes == 2 * (2 * positions * 128 + positions * 27 + 128 * 128 * 9)
assert forward.vector == 10 * positions * 128 * 9 and forward.added == 0
assert both.matrix == 3 * forward.matrix and both.added == 4 * positions * 128 * 9
assert floors.floor(both, "bfloat16") == max(both.seconds("bfloat16").values()) < floors.predicted(both, "bfloat16")
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
