"""Writes the schemas of all operators for C++: ``python packaging/schemas.py FILE``.

They are read from the calls of ``define`` and ``define_adjoint`` in every ``ops/*/op.py``. These are not imported,
because torch may not run where the library is built.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

OPS = Path(__file__).resolve().parents[1] / "src" / "deformkit" / "ops"


def schemas(ops: Path = OPS) -> list[str]:
    """The schemas of every operator and its backward, as ``Library.define`` takes them."""
    text = _loaded(ops / "_schema.py")
    found = []
    for path in sorted(ops.glob("*/op.py")):
        for schema, gradients in _definitions(path):
            found += [schema, text.backward_schema(schema, gradients)]
    return found


def _definitions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("define", "define_adjoint"):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            yield ast.literal_eval(node.args[0]), len(ast.literal_eval(keywords["differentiable"]))


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Write the file, unless it holds the same text."""
    sys.dont_write_bytecode = True
    file = Path(sys.argv[1])
    text = "".join(f'"{schema}",\n' for schema in schemas())
    if not file.is_file() or file.read_text() != text:
        file.write_text(text)


if __name__ == "__main__":
    main()
