"""Runs every operator in every runtime, and writes the differences from eager float64 to results/runtimes.json.

python benchmarks/runtimes.py            every runtime that is installed, printed as a table
python benchmarks/runtimes.py --save     also into results/runtimes.json and docs/deploy/runtimes.md
python benchmarks/runtimes.py "ONNX Runtime" OpenVINO
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deformkit as dk
from deformkit._testing.resized import Resized, resized

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/runtimes.json", ROOT / "docs/deploy/runtimes.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
Values = Sequence[Tensor]
# Batch and spatial size of what is exported, and of what is run.
TRACED, OTHERS = (2, 6), ((2, 6), (3, 9), (5, 7))


def program(each: Resized) -> Any:
    with torch.no_grad():
        return torch.export.export(each.module, each.draw(*TRACED), dynamic_shapes=each.dynamic_shapes())


def eager(each: Resized, folder: Path) -> Callable[[Values], Tensor]:
    return lambda values: each.module(*values)


def exported(each: Resized, folder: Path) -> Callable[[Values], Tensor]:
    torch.export.save(program(each), folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2").module()
    return lambda values: loaded(*values)


def compiled(each: Resized, folder: Path) -> Callable[[Values], Tensor]:
    """In the program of examples/cpp, which prints the difference."""
    torch._inductor.aoti_compile_and_package(program(each), package_path=str(folder / "model.pt2"))
    torch_home, ours = Path(torch.__file__).parent, Path(dk.library_path()).parents[1]
    build = Path(tempfile.gettempdir()) / "deformkit-runtimes-cpp"
    if not (build / "deploy").exists():
        prefix = f"-DCMAKE_PREFIX_PATH={torch_home};{ours}"
        subprocess.run(["cmake", "-S", ROOT / "examples/cpp", "-B", build, prefix], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", build], check=True, capture_output=True)

    def run(values: Values) -> Tensor:
        expected = each.module(*values)
        # The program writes no tensor: its difference is added to what it was compared with.
        torch.save([*values, expected], folder / "values.pt")
        done = subprocess.run(
            [build / "deploy", folder / "model.pt2", folder / "values.pt"], capture_output=True, text=True
        )
        if "differs by" not in done.stdout:
            raise RuntimeError(done.stderr or done.stdout)
        return expected + float(done.stdout.split("differs by ")[1].split()[0]) * expected.abs().max()

    return run


def onnx_runtime(each: Resized, folder: Path, library: bool = False) -> Callable[[Values], Tensor]:
    import onnxruntime

    path = folder / "model.onnx"
    dk.onnx.export(each.module, each.draw(*TRACED), path, dynamic_shapes=each.dynamic_shapes())
    options = onnxruntime.SessionOptions()
    if library:
        options.register_custom_ops_library(dk.onnx.library())
    session = onnxruntime.InferenceSession(path, options)
    names = [node.name for node in session.get_inputs()]
    return lambda values: torch.from_numpy(
        session.run(None, {n: v.numpy() for n, v in zip(names, values, strict=True)})[0]
    )


def openvino(each: Resized, folder: Path) -> Callable[[Values], Tensor]:
    import openvino

    model = dk.openvino.convert(each.module, each.draw(*TRACED), dynamic_shapes=each.dynamic_shapes())
    ready = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda values: torch.from_numpy(ready([value.numpy() for value in values])[0])


def executorch(each: Resized, folder: Path) -> Callable[[Values], Tensor]:
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    # Its memory is planned for the largest sizes, and that of attention for the batch size that was traced: 20 is
    # enough for those that are run.
    largest = torch.export.Dim.AUTO(max=20)
    shapes = each.dynamic_shapes(largest)
    with torch.no_grad(), dk.export.decomposed():
        made = torch.export.export(each.module, each.draw(*TRACED), dynamic_shapes=shapes)
    data = to_edge(made).to_executorch().buffer

    def run(values: Values) -> Tensor:
        # A method holds on neither to its program nor to the bytes of that.
        loaded = Runtime.get().load_program(data)
        return loaded.load_method("forward").execute(tuple(values))[0].clone()

    return run


def tvm(each: Resized, folder: Path) -> Callable[[Values], Tensor]:
    import tvm
    from tvm.relax.frontend.torch import from_exported_program

    # Its importer does not know this operation, and its own language does.
    def scatter_add(node: torch.fx.Node, importer: Any) -> Any:
        values, axis, index, added = importer.retrieve_args(node)
        return importer.block_builder.emit(tvm.relax.op.scatter_elements(values, index, added, axis, "add"))

    with torch.no_grad(), dk.export.decomposed():
        made = torch.export.export(each.module, each.draw(*TRACED), dynamic_shapes=each.dynamic_shapes())
    imported = from_exported_program(made, custom_convert_map={"scatter_add.default": scatter_add})
    machine = tvm.relax.VirtualMachine(tvm.compile(imported, target="llvm"), tvm.cpu())

    def run(values: Values) -> Tensor:
        found = machine["main"](*(tvm.runtime.tensor(value.numpy()) for value in values))
        return torch.from_numpy((found if hasattr(found, "numpy") else found[0]).numpy())

    return run


RUNTIMES: dict[str, tuple[Callable[..., Callable[[Values], Tensor]], tuple[str, ...]]] = {
    "eager": (eager, ()),
    "exported": (exported, ()),
    "AOTInductor in C++": (compiled, ()),
    "ONNX Runtime": (onnx_runtime, ("onnxruntime", "onnxscript")),
    "ONNX Runtime with deformkit": (partial(onnx_runtime, library=True), ("onnxruntime", "onnxscript")),
    "OpenVINO": (openvino, ("openvino",)),
    "ExecuTorch": (executorch, ("executorch",)),
    "TVM": (tvm, ("tvm",)),
}


def cell(each: Resized, runtime: str) -> dict[str, Any]:
    """The worst difference from float64, relative to the largest value, or why there is none."""
    function, packages = RUNTIMES[runtime]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        return {"reason": f"not installed: {', '.join(missing)}"}
    if runtime == "AOTInductor in C++" and shutil.which("cmake") is None:
        return {"reason": "not installed: cmake"}
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            run = function(each, Path(folder))
            for sizes in OTHERS:
                values = each.draw(*sizes)
                found = run(values)
                truth = each.module.double()(*(value.double() for value in values))
                each.module.float()
                if found.shape != truth.shape:
                    return {"reason": f"shape {list(found.shape)} instead of {list(truth.shape)}"}
                difference = (found.double() - truth).abs().max() / truth.abs().max()
                worst = max(worst, difference.item())
        except Exception as error:
            each.module.float()
            return {"reason": reason(error)}
    return {"difference": worst}


def reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:140]}".replace("|", "/")


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row for each operator and dimension; reasons are numbered below it."""
    runtimes = list(next(iter(results.values())))
    reasons: list[str] = []

    def shown(found: dict[str, Any]) -> str:
        if "difference" in found:
            return f"{found['difference']:.0e}"
        if found["reason"] not in reasons:
            reasons.append(found["reason"])
        return f"({reasons.index(found['reason']) + 1})"

    lines = [["operator", *runtimes], ["---"] * (len(runtimes) + 1)]
    lines += [[f"`{name}`", *(shown(found) for found in row.values())] for name, row in results.items()]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{i}. {reason}" for i, reason in enumerate(reasons, 1)).rstrip() + "\n"


def main(names: Sequence[str], save: bool) -> None:
    unknown = set(names) - RUNTIMES.keys()
    if unknown:
        raise SystemExit(f"unknown runtimes {sorted(unknown)}; they are {', '.join(RUNTIMES)}")
    results: dict[str, dict[str, Any]] = {}
    warnings.simplefilter("ignore")
    for each in (call for axes in (1, 2, 3) for call in resized(axes)):
        results[str(each)] = {}
        for name in names or RUNTIMES:
            results[str(each)][name] = found = cell(each, name)
            print(f"{each}: {name}: {found.get('difference', found.get('reason'))}", file=sys.stderr, flush=True)
    print(table(results))
    if save:
        # Runtimes may need environments of their own: what they found is kept.
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        both = {name: {**kept.get(name, {}), **row} for name, row in results.items()}
        both = {name: {r: row[r] for r in RUNTIMES if r in row} for name, row in both.items()}
        RESULTS.write_text(json.dumps(both, indent=1) + "\n")
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(f"{before}{START}{table(both)}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtimes", nargs="*", help="all, if none is named")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    main(given.runtimes, given.save)
