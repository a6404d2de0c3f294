"""Tensors whose memory was freed, as by sharding or offloading, raise an error that names them before a kernel runs."""

import subprocess
import sys
from pathlib import Path

import pytest
from rooms import representatives

CODE = """
import sys
sys.path.insert(0, {tests!r})
from rooms import representatives

[call] = [call for call in representatives() if str(call) == {call!r}]
args = call.arguments()
backward = call.backward_arguments(args)
for operator, values in ((call.operator, args), (call.backward_operator, backward)):
    for i in operator.tensors:
        if values[i] is None:
            continue
        freed = values[i].clone()
        freed.untyped_storage().resize_(0)
        try:
            operator.overload(*values[:i], freed, *values[i + 1 :])
        except (ValueError, RuntimeError) as error:
            assert operator.arguments[i] in str(error), error
        else:
            raise AssertionError(f"{{operator.name}} took a freed {{operator.arguments[i]}}")
"""


@pytest.mark.parametrize("call", [str(call) for call in representatives(each_axes=False)])
def test_freed_storage_raises(call: str) -> None:
    code = CODE.format(tests=str(Path(__file__).parents[1]), call=call)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr or f"ended by signal {-run.returncode}"
