"""``deformkit.hf``: transformers takes our layer where the package kernels is accepted, and says why where not."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from deformkit import hf

# In a process of its own, because transformers asks for the package kernels when it is imported. The check of the
# version is switched off: what transformers accepts may not be released yet.
PROGRAM = """
import copy
import torch
import transformers
from transformers import utils

utils.is_kernels_available = utils.import_utils.is_kernels_available = lambda *args: True
from deformkit import hf
from patched import ours

torch.manual_seed(0)
backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"], depths=[1, 1, 1, 1])
small = dict(encoder_layers=1, decoder_layers=2, num_queries=5, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32)
config = transformers.DeformableDetrConfig(
    use_timm_backbone=False, backbone=None, backbone_config=backbone,
    encoder_attention_heads=4, decoder_attention_heads=4, **small,
)
model = transformers.DeformableDetrModel(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
pixels = torch.randn(2, 3, 64, 64)
later = copy.deepcopy(model)

def calls(model):
    return ours(lambda: model(pixels))["ms_deform_attn"]

def output(model):
    with torch.no_grad():
        return model(pixels).last_hidden_state

expected, before = output(model), calls(model)
model.set_use_kernels(True)
untouched = calls(model)
hf.register()
hf.register()
model.set_use_kernels(True)
later.set_use_kernels(True)
differences = [(output(m) - expected).abs().max().item() for m in (model, later)]
print("calls:", before, untouched, calls(model), calls(later))
print("close:", all(d < 1e-5 for d in differences), "same:", all(d == 0 for d in differences))
loss = model.train().set_use_kernels(True) or model(pixels).last_hidden_state.square().sum()
loss.backward()
print("trained:", all(p.grad is not None for n, p in model.named_parameters() if "sampling_offsets" in n))
hf.unregister()
hf.unregister()
model.eval().set_use_kernels(True)
print("after:", calls(model), (output(model) - expected).abs().max().item())
cuda = hf._packages()[1]["MultiScaleDeformableAttention"]
print("mapping:", list(cuda), type(cuda["cuda"]).__name__)
"""


@pytest.mark.skipif(find_spec("kernels") is None, reason="needs kernels, whose many dependencies are not installed")
def test_a_model_of_transformers_takes_the_layer_and_gives_it_back() -> None:
    pytest.importorskip("transformers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == [
        "calls: 0 0 3 3",
        "close: True same: False",
        "trained: True",
        "after: 0 0.0",
        "mapping: ['cuda'] LayerRepository",
    ], done.stderr


@pytest.mark.parametrize(
    ("installed", "available", "message"),
    [
        (None, False, r"needs kernels>=1\.5,<2, which is missing: pip install 'kernels>=1\.5,<2' and restart Python"),
        ("1.4", False, r"needs kernels>=1\.5,<2 and ignores kernels 1\.4: pip install 'kernels>=1\.5,<2'"),
        ("1.6", True, r"ignores the package kernels because of the variable USE_HUB_KERNELS: unset USE_HUB_KERNELS"),
    ],
)
def test_where_transformers_ignores_kernels_there_is_an_error(
    installed: str | None, available: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub: Any = SimpleNamespace(KERNELS_MIN_VERSION="1.5", KERNELS_MAX_VERSION="2")
    hub.is_kernels_available = lambda: available
    hub.use_kernel_forward_from_hub = lambda name: lambda cls: cls
    hub.get_kernel_mapping_transformers = dict
    monkeypatch.setitem(sys.modules, "transformers.integrations.hub_kernels", hub)
    monkeypatch.setattr(hf, "version", {"kernels": installed, "transformers": "9.0"}.__getitem__)
    with pytest.raises(ImportError, match=rf"^transformers 9\.0 {message}.*or call deformkit\.patch\(model\)"):
        hf.register()
    hf.unregister()
