"""The example of training on several processes: the same results as one, a lost worker, a volume too large for one."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks

from deformkit._testing import assert_close, half_of_digits

for package in ("typer", "sklearn", "scipy", "rich", "matplotlib", "nibabel", "nilearn"):
    pytest.importorskip(package)
torch.distributed.is_available() or pytest.skip("this PyTorch has no processes that talk", allow_module_level=True)

# DDP warns once in a process of gradients of 1x1x1 kernels, in whichever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")

FOLDER = Path(__file__).parent


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = map(str, folders)
    yield
    sys.path[:] = before


with importable(FOLDER, FOLDER.parents[1] / "examples"):
    import detection_2d  # noqa: F401 - the example imports it when it is needed
    import killed
    import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, list[float]]:
    """The losses of one process."""
    return {
        task: list(train.run(folder / f"{task}_ddp_1", task, precision="float64", **train.COMMON).values())
        for task in train.STRATEGIES[1]
    }


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    return on_ranks(2, FOLDER / "train.py", folder, str(folder))


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[str, Any]:
    return on_ranks(4, FOLDER / "train.py", folder, str(folder))


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_weights_are_those_of_one_process(
    ranks: int, folder: Path, one: dict[str, list[float]], request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue({2: "two", 4: "four"}[ranks])
    assert len(found) == sum(map(len, train.STRATEGIES[ranks].values()))
    for name, (losses, *_) in found.items():
        task, strategy = name.split()
        assert_close(torch.tensor(losses).double(), torch.tensor(one[task]).double(), name=f"losses, {name}")
        expected = killed.state(folder / f"{task}_ddp_1")["model"]
        weights = killed.state(folder / f"{task}_{strategy}_{ranks}")["model"]
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            # The optimizer divides by the size of gradients: the rounding of small ones counts as much as a step.
            error = (value - expected[key]).abs().max() / expected[key].abs().max().clamp(min=1e-3)
            assert error <= half_of_digits(torch.float64), f"{key}, {name}: {error}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_the_plan(ranks: int, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue({2: "two", 4: "four"}[ranks])
    for name, (_, counted, predicted) in found.items():
        assert counted.keys() >= predicted.keys(), name
        total = sum(counted.values())
        assert abs(sum(predicted.values()) - total) <= 0.05 * total, (name, counted, predicted)
        for kind, size in predicted.items():
            # What is less than a hundredth of all, such as the sum of the losses, is not planned.
            assert abs(size - counted[kind]) <= 0.05 * counted[kind] + 0.01 * total, (name, counted, predicted)


def test_a_killed_worker_changes_nothing(folder: Path, two: dict[str, Any]) -> None:
    options = train.UNDISTURBED
    lines = killed.train(folder / "killed", options, [(5, 1, 0.05)])
    assert killed.differences(killed.state(folder / "undisturbed"), killed.state(folder / "killed")) == []
    ((after, since),) = killed.continued(lines)
    assert after in (0, 2, 4, 6) and since == list(range(after + 1, options["steps"] + 1))


def test_a_volume_that_one_process_cannot_hold(folder: Path, two: dict[str, Any]) -> None:
    assert (folder / "large").is_dir()
    # In a process of its own, which has no freed memory left to use again.
    paths = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parents[1] / "examples")]
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import train
with train.address_space(train.MEGABYTES):
    train.run(Path(sys.argv[1]), **train.LARGE)
"""
    command = [sys.executable, "-c", code, str(folder / "too_large")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "memory" in done.stderr, done.stderr[-2000:]


def test_wrong_options_are_named() -> None:
    from typer.testing import CliRunner

    app = train.example.typer.Typer()
    app.command()(train.example.main)
    for options, message in (
        (["--strategy", "spatial"], "--task segment"),
        (["--batch", "7"], "it must divide the 144 samples"),
        (["--task", "segment", "--size", "99"], "--size is 99"),
    ):
        result = CliRunner().invoke(app, options)
        assert result.exit_code != 0 and message in str(result.exception), result.output
