"""Tensors whose memory was freed, as by sharding or offloading, raise an error that names them before a kernel runs."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
sys.path.insert(0, {tests!r})
from rooms import representatives

for call in representatives(each_axes=False):
    args = call.arguments()
    backward = call.backward_arguments(args)
    for operator, values in ((call.operator, args), (call.backward_operator, backward)):
        for i in operator.tensors:
            if values[i] is None:
                continue
            freed = values[i].clone()
            freed.untyped_storage().resize_(0)
            print(operator.name, operator.arguments[i], flush=True)
            try:
                operator.overload(*values[:i], freed, *values[i + 1 :])
            except (ValueError, RuntimeError) as error:
                assert operator.arguments[i] in str(error), error
            else:
                raise AssertionError("no error")
"""


def test_freed_storage_raises() -> None:
    """In a process of its own, whose last line names the operator and the argument that ended it."""
    code = CODE.format(tests=str(Path(__file__).parents[1]))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr} ended with {run.returncode}"
