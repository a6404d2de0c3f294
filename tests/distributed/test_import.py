"""The sharding rules are there as soon as DTensor is, and DTensor is not imported for them."""

import subprocess
import sys

import pytest

REGISTERED = """
from torch.distributed.tensor import DTensor
propagator = DTensor._op_dispatcher.sharding_propagator
assert torch.ops.deformkit.deform_conv.default in propagator.op_strategy_funcs
assert torch.ops.deformkit.ms_deform_attn_backward.default in propagator.op_strategy_funcs
assert type(torch.distributed.tensor.__loader__).__module__ == "_frozen_importlib_external"
assert "torch.distributed.tensor" not in [getattr(finder, "_name", None) for finder in sys.meta_path]
"""


@pytest.mark.parametrize(
    "code",
    [
        "import deformkit, torch; assert 'torch.distributed.tensor' not in sys.modules\n"
        "import torch.distributed.tensor",
        "import torch.distributed.tensor, deformkit",
        "import deformkit.distributed, torch",
        "import deformkit, torch; deformkit.distributed.register()",
    ],
    ids=["before", "after", "by itself", "by name"],
)
def test_registered_by_import(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import sys; {code}\n{REGISTERED}"], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
