import os
import random
from collections.abc import Iterator

import pytest
import torch

# Before the kernels are loaded: tests of threads make small calls.
os.environ["DEFORMKIT_SPREAD_SMALL_CALLS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("cpu", "triton", "cuda"),
        default="cpu",
        help="what answers calls with CPU tensors: the C++ kernels, the Triton kernels in the interpreter or on a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    kernels, present = config.getoption("--kernels"), torch.cuda.is_available()
    if kernels == "cuda" and not present:
        raise pytest.UsageError("--kernels cuda: torch sees no CUDA device")
    if kernels == "triton" or not present:
        # Triton reads it when a kernel is defined.
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kernels") == "triton":
        for item in items:
            if item.get_closest_marker("huge"):
                item.add_marker(pytest.mark.skip(reason="the interpreter of Triton copies gigabytes for it"))


@pytest.fixture(scope="session", autouse=True)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.config.getoption("--kernels") == "cpu":
        yield
    else:
        import triton_kernels

        with triton_kernels.instead_of_cpp():
            yield


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Fixed seeds, memory full of NaN, and no warning that depends on earlier calls.

    In deterministic mode every ``empty`` of torch is filled with NaN, also those that a kernel allocates in C++:
    an element that a kernel forgets to write, or reads before it has written it, shows in its result.
    """
    from deformkit.ops import _suspect

    random.seed(0)
    torch.manual_seed(0)
    _suspect.given.clear()
    # Many tests sample far outside and from inverted RoIs on purpose.
    _suspect.looks_left.update(rois=0, locations=0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, 2, 3], ids=["1d", "2d", "3d"])
def axes(request: pytest.FixtureRequest) -> int:
    """The number of spatial axes."""
    return request.param


@pytest.fixture(
    params=[torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d).split(".")[1]
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that the operators support."""
    return request.param
