"""Models run in processes that do not import deformkit: schemas, libraries, and a program without Python."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deformkit as dk
from deformkit._kernels import selection
from deformkit.ops import _operator
from deformkit.ops._operator import operators

ROOT = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(selection.library is None, reason="libdeformkit.so is not built")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Everything(nn.Module):
    """One call of every operator; the result is a vector for each sample of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = dk.nn.PackedDeformConv2d(3, 4, 3, padding=1)
        self.up = dk.nn.PackedDeformConvTranspose2d(4, 4, 2, stride=2)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, input: Tensor) -> Tensor:
        batch = input.shape[0]
        field = self.up(self.conv(input))
        points = field[:, :1, :5, :2] * 3 + 2
        sampled = dk.deform_sample(field, points)
        splat = dk.deform_splat(sampled, points, (6, 7))
        value = field.flatten(2).transpose(1, 2).unflatten(2, (2, 2))
        shapes, locations = (
            [tuple(field.shape[2:])],
            points.sigmoid().reshape(batch, 5, 1, 1, 1, 2).expand(-1, -1, 2, -1, -1, -1),
        )
        weights = dk.deform_correlate(value[:, :5], value, shapes, locations)
        attended = dk.ms_deform_attn(value, shapes, locations, weights)
        offset = field.movedim(1, -1)[..., None, None, :2]
        aggregated = dk.deform_aggregate(field.movedim(1, -1).unsqueeze(-2), offset, torch.ones_like(offset[..., 0]), 1)
        rois = torch.cat([torch.zeros_like(points[:, 0, 0, :1]), points[:, 0, 0], points[:, 0, 0] + 4], -1)
        pooled = dk.deform_roi_pool(field, rois.detach(), output_size=2, sampling_ratio=2)
        return torch.cat([part.flatten(1) for part in (sampled, splat, attended, aggregated, pooled)], 1)


class Scripted(nn.Module):
    """What TorchScript compiles of the public functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, input: Tensor, offset: Tensor) -> Tensor:
        field = dk.deform_conv2d(input, offset, self.weight, padding=1)
        return dk.deform_conv_transpose2d(field, offset, self.weight, padding=1)


def run(program: str, *arguments: Any, **environment: str) -> str:
    """What a Python without deformkit prints, which must not have imported it unless the program has."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def schemas() -> dict[str, str]:
    return {name: str(torch._C.parse_schema(f"deformkit::{operator.schema}")) for name, operator in operators.items()}


def test_the_schemas_of_the_build_are_those_of_the_operators() -> None:
    path = ROOT / "packaging" / "schemas.py"
    if not path.is_file():
        pytest.skip("needs the sources")
    found = run(f"import runpy; print(*runpy.run_path({str(path)!r})['schemas'](), sep='\\n')").splitlines()
    assert {name: operator.schema for name, operator in operators.items()} == {s.split("(")[0]: s for s in found}


@needs_library
def test_the_library_defines_the_same_schemas() -> None:
    program = """
import json, sys, torch
path, *names = sys.argv[1:]
torch.ops.load_library(path)
print(json.dumps({n: str(getattr(torch.ops.deformkit, n).default._schema) for n in names}))
print(json.dumps({n: sorted(map(str, getattr(torch.ops.deformkit, n).default.tags)) for n in names}))
assert not any(name.startswith("deformkit") for name in sys.modules)
import deformkit
torch.ops.load_library(deformkit.library_path())
assert deformkit._kernels.selection.isa
"""
    first, second = run(program, dk.library_path(), *operators).splitlines()
    assert json.loads(first) == schemas()
    expected = {name: sorted(map(str, operator.overload.tags)) for name, operator in operators.items()}
    assert json.loads(second) == expected and all(len(tags) == 2 for tags in expected.values())


@needs_library
def test_python_defines_what_no_library_does_and_a_library_may_follow(tmp_path: Path) -> None:
    """Without libraries Python defines the operators; what is loaded then only adds kernels."""
    package = shutil.copytree(
        Path(dk.__file__).parent, tmp_path / "deformkit", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    program = f"""
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, {str(tmp_path)!r})
import torch, deformkit
from deformkit.ops._operator import operators
assert deformkit.__file__.startswith({str(tmp_path)!r}) and deformkit._kernels.selection.library is None
print(json.dumps({{name: str(operator.overload._schema) for name, operator in operators.items()}}))
x, offset, weight = torch.randn(1, 2, 9), torch.randn(1, 3, 7), torch.randn(3, 2, 3)
before = deformkit.deform_conv1d(x, offset, weight)
torch.ops.load_library(sys.argv[1])
assert torch._C._dispatch_has_kernel_for_dispatch_key("deformkit::deform_conv", "CPU")
assert torch.allclose(deformkit.deform_conv1d(x, offset, weight), before, atol=1e-5)
try:
    deformkit.library_path()
except RuntimeError as error:
    assert "without libdeformkit.so" in str(error) and "pip install" in str(error)
else:
    raise AssertionError
"""
    assert package.is_dir()
    assert json.loads(run(program, dk.library_path())) == schemas()


def test_an_operator_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ImportError, match=r"deform_sample exists already, from another version.* int mode\) -> Tensor; .* "
    ):
        _operator._defined("deform_sample(Tensor input, Tensor points, int boundary) -> Tensor")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model as an exported program, a scripted module and a package, and values to compare."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = Everything().eval()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (torch.randn(2, 3, 8, 9),), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / "model.ep.pt2")
        input, offset, scripted = torch.randn(3, 3, 8, 9), torch.randn(3, 18, 8, 9), Scripted()
        torch.jit.script(scripted).save(folder / "script.pt")
        torch.save([input, offset, scripted(input, offset)], folder / "script_values.pt")
        torch.save([input, model(input)], folder / "values.pt")
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return folder


@needs_library
def test_exported_programs_scripts_and_packages_run_without_deformkit(exported: Path) -> None:
    program = """
import sys, torch
path, folder = sys.argv[1:]
torch.ops.load_library(path)
def error(model, values):
    *inputs, expected = torch.load(f"{folder}/{values}")
    return ((model(*inputs) - expected).abs().max() / expected.abs().max()).item()
with torch.no_grad():
    print(error(torch.export.load(f"{folder}/model.ep.pt2").module(), "values.pt"))
    print(error(torch.jit.load(f"{folder}/script.pt"), "script_values.pt"))
    print(error(torch._inductor.aoti_load_package(f"{folder}/model.pt2"), "values.pt"))
assert not any(name.startswith("deformkit") for name in sys.modules)
"""
    errors = [float(line) for line in run(program, dk.library_path(), exported).split()]
    assert len(errors) == 3 and max(errors) < 1e-5


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the program with ldd")
def test_a_program_without_python_runs_a_package(exported: Path, tmp_path: Path) -> None:
    tools = {
        name: shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
        for name in ("cmake", "ninja", "c++")
    }
    if None in tools.values():
        pytest.skip("needs a C++ compiler, cmake and ninja")
    assert selection.library is not None
    prefix = selection.library.parents[1]
    if not (prefix / "lib/cmake/deformkit/deformkitConfig.cmake").is_file():
        # The libraries were built in place: arrange them as the build installs them.
        prefix = tmp_path / "installed"
        (prefix / "lib/cmake/deformkit").mkdir(parents=True)
        shutil.copy(ROOT / "packaging/deformkitConfig.cmake", prefix / "lib/cmake/deformkit")
        for library in selection.library.parent.glob("*.so"):
            (prefix / "lib" / library.name).symlink_to(library)
    where = f"-DCMAKE_PREFIX_PATH={prefix};{Path(torch.__file__).parent}"
    configure = [str(tools["cmake"]), "-S", str(ROOT / "examples/cpp"), "-B", str(tmp_path), "-G", "Ninja", where]
    for command in (
        [*configure, f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"],
        [str(tools["cmake"]), "--build", str(tmp_path)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if "uses CUDA but I cannot find the CUDA" in done.stderr:
            pytest.skip("find_package(Torch) of a torch for GPUs needs the CUDA toolkit")
        assert done.returncode == 0, done.stdout + done.stderr
    program = tmp_path / "deploy"
    done = subprocess.run([program, exported / "model.pt2", exported / "values.pt"], capture_output=True, text=True)
    assert done.returncode == 0 and "the output differs by" in done.stdout, done.stdout + done.stderr
    linked = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    assert "libdeformkit.so" in linked and "libpython" not in linked and "libtorch_python" not in linked
    # A wrong output is found.
    torch.save([value + 1 for value in torch.load(exported / "values.pt")], tmp_path / "wrong.pt")
    assert subprocess.run([program, exported / "model.pt2", tmp_path / "wrong.pt"], capture_output=True).returncode == 1
