"""The benchmarks run; their times are not tested."""

import re
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest

from deformkit.ops._operator import operators

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FORWARD = [name for name in operators if not name.endswith("_backward")]
RIVALS = {
    "conv": ["plain"],
    "attn": ["transformers"],
    "aggregate": ["grid_sample"],
    "roi": [],
    "sample": ["grid_sample"],
    "transpose": ["plain"],
    "correlate": ["grid_sample"],
    "splat": ["index_add"],
}


def run(*options: str) -> str:
    program = [sys.executable, str(BENCHMARKS / "run.py"), "--tiny", *options]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrong" not in done.stdout and "failed" not in done.stdout
    return done.stdout


def run_sections(sections: Iterable[str], *options: str) -> dict[str, str]:
    """The output of each section, in one process."""
    _, *outputs = re.split("^## ", run(*sections, *options), flags=re.MULTILINE)
    return dict(zip(sections, outputs, strict=True))


def test_comments_name_sections_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' constants name the command that measures them again."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from table import SECTIONS

    source = BENCHMARKS.parent / "src"
    texts = [path.read_text() for suffix in ("*.h", "*.cpp") for path in source.rglob(suffix)]
    named = [words for text in texts for words in re.findall(r"benchmarks/run\.py ([^`]*)`", text)]
    assert named
    for words in named:
        assert set(words.split(" --")[0].split()) <= set(SECTIONS)


@pytest.mark.slow
def test_operators_against_others() -> None:
    everyone = ["reference", *dict.fromkeys(chain(*RIVALS.values()))]
    for section, output in run_sections(RIVALS, "--rivals", ",".join(everyone)).items():
        heads = [line for line in output.splitlines() if line.startswith("| case")]
        shown = {rival for rival in everyone for head in heads if f"| {rival} |" in head}
        assert shown == {"reference", *RIVALS[section]}, section
        for axes in (1, 2, 3):
            assert output.count(f"| {axes}d (") == 2, section


@pytest.mark.slow
def test_layers() -> None:
    output = run("layers", "--seconds", "0")
    for layer in ("GuidedDeformAttn", "DeformableAggregation", "Warp3d", "SoftmaxSplat", "SnakeConv2d", "LDConv2d"):
        assert output.count(f"| {layer} 1x") == 2


@pytest.mark.slow
def test_all_operators() -> None:
    outputs = run_sections(["half", "growth", "overhead"], "--case", "1d", "--rivals", "plain,reference")
    for section, output in outputs.items():
        assert "| 1d (" in output, section
        for name in FORWARD:
            assert f"#### {name}" in output, section


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of resident memory is read from /proc")
def test_memory() -> None:
    """One operator: each figure takes a process of its own, which finds its case by the operator's name."""
    output = run("memory", "--case", "deform_conv 1d", "--rivals", "plain")
    assert output.count("#### deform_conv: ") == 2 and output.count("| 1d (") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d_fine", "mask2former"])
def test_models(name: str) -> None:
    """One model whose instances are patched, and one whose function is patched for all models."""
    pytest.importorskip("transformers")
    output = run("models", "--case", name)
    assert output.count(f"| {name} | 96 pixels | 6 |") == 2 and "nan" not in output


def test_tables_are_those_of_the_results() -> None:
    program = (
        "import table; assert all(table.page(kernels) == page.read_text() for kernels, page in table.PAGES.items())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_targets_refer_to_existing_cases() -> None:
    program = """
import targets
from deformkit._testing import rivals
import layers
from deformkit._testing.cases import ROOMS
for table in targets.TABLES:
    if table.operator == "layers":
        assert set(table.cases) <= set(layers.CASES) and set(table.targets) == {layers.TORCH}
        continue
    cases = {case.name: case for case in ROOMS[table.operator].BENCHMARKS}
    for name in table.cases:
        assert set(table.targets) <= set(rivals.rivals(cases[name], rivals.EVERYONE)), name
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
