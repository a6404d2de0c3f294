"""Swapping parts and restoring them: copies, names that models share, changes by others, and refused models."""

import copy
import gc
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from patched import attention, ours
from torch import Tensor, nn

import deformkit as dk
from deformkit._testing import assert_equal


def test_copies(layer: tuple[nn.Module, dict[str, Any]]) -> None:
    host, arguments = layer
    names, types = list(vars(host)), [type(module) for module in host.modules()]
    state, text = host.state_dict(), repr(host)
    expected = host(**arguments)[0]
    done = dk.patch(host)
    patched = host(**arguments)[0]
    assert list(host.state_dict()) == list(state) and repr(host) == text
    file = io.BytesIO()
    torch.save(host, file)
    file.seek(0)
    copies = [
        copy.deepcopy(host),
        copy.copy(host),
        pickle.loads(pickle.dumps(host)),
        torch.load(file, weights_only=False),
    ]
    for one in copies:
        assert ours(lambda one=one: one(**arguments))["ms_deform_attn"] == 1
        assert_equal(one(**arguments)[0], patched)
    dk.unpatch(done)
    for one in copies:
        dk.unpatch(one)
        assert not ours(lambda one=one: one(**arguments))
        assert_equal(one(**arguments)[0], expected)
    for one in [host, *copies]:
        assert list(vars(one)) == names and [type(module) for module in one.modules()] == types


def test_only_the_given_instances() -> None:
    for model_type in ("deformable_detr", "mask2former", "d_fine"):
        (one, arguments), (other, _) = attention(model_type), attention(model_type)
        done = dk.patch(one)
        assert {part.shared for part in done.replaced} == {None}
        assert "in this model alone" in str(done)
        assert not ours(lambda other=other, arguments=arguments: other(**arguments))


def test_shared_functions_come_back_with_the_last_model() -> None:
    (one, arguments), (other, _) = attention("rt_detr_v2"), attention("rt_detr_v2")
    module = sys.modules[type(one).__module__]
    original = module.multi_scale_deformable_attention_v2
    done, second = dk.patch(one), dk.patch(other)
    name = f"{module.__name__}.multi_scale_deformable_attention_v2"
    assert [part.shared for part in done.replaced] == [part.shared for part in second.replaced] == [name]
    assert "for every model that looks it up" in str(done)
    dk.unpatch(one)
    assert ours(lambda: other(**arguments)) and module.multi_scale_deformable_attention_v2 is not original
    dk.unpatch(one)
    assert ours(lambda: other(**arguments))
    dk.unpatch(second)
    assert module.multi_scale_deformable_attention_v2 is original


def test_part_of_a_model_holds_shared_functions_too() -> None:
    layer, _ = attention("rt_detr_v2")
    module = sys.modules[type(layer).__module__]
    original = module.multi_scale_deformable_attention_v2
    whole = nn.Sequential(layer)
    dk.patch(layer)
    dk.patch(whole)
    dk.unpatch(whole)
    assert module.multi_scale_deformable_attention_v2 is original


def test_shared_function_that_others_replaced_later_stays_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = attention("rt_detr_v2")
    module = sys.modules[type(layer).__module__]
    monkeypatch.setattr(module, "multi_scale_deformable_attention_v2", module.multi_scale_deformable_attention_v2)
    dk.patch(layer)
    module.multi_scale_deformable_attention_v2 = theirs = object()
    dk.unpatch(layer)
    assert module.multi_scale_deformable_attention_v2 is theirs


def test_shared_function_that_others_restored_is_replaced_again() -> None:
    layer, arguments = attention("rt_detr_v2")
    module = sys.modules[type(layer).__module__]
    original = module.multi_scale_deformable_attention_v2
    dk.patch(layer)
    module.multi_scale_deformable_attention_v2 = original
    dk.patch(layer)
    assert ours(lambda: layer(**arguments))
    dk.unpatch(layer)
    assert module.multi_scale_deformable_attention_v2 is original


def test_shared_function_comes_back_when_the_last_model_ends() -> None:
    (one, arguments), models = attention("rt_detr_v2"), [attention("rt_detr_v2")[0] for _ in range(2)]
    module = sys.modules[type(one).__module__]
    original = module.multi_scale_deformable_attention_v2
    for model in models:
        dk.patch(model)
    del model, models[0]
    gc.collect()
    assert ours(lambda: one(**arguments))
    models.clear()
    gc.collect()
    assert module.multi_scale_deformable_attention_v2 is original


def test_model_that_ends_while_another_is_patched() -> None:
    """Two patched models do not affect each other."""
    one, (other, arguments) = attention("rt_detr_v2")[0], attention("rt_detr_v2")
    module = sys.modules[type(one).__module__]
    original = module.multi_scale_deformable_attention_v2
    models = [one]
    dk.patch(one)
    del one

    class Ending(nn.Module):
        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            models.clear()
            gc.collect()
            yield from super().named_modules(*args, **kwargs)

    ending = Ending()
    ending.layer = other
    assert dk.patch(ending).replaced
    assert ours(lambda: other(**arguments))
    dk.unpatch(ending)
    assert module.multi_scale_deformable_attention_v2 is original


def test_threads() -> None:
    """Each caller hears about its own model, and nothing stays replaced."""
    made = [attention(model_type)[0] for model_type in ("rt_detr_v2", "mask2former") * 8]
    modules = [sys.modules[type(model).__module__] for model in made[:2]]
    names = ("multi_scale_deformable_attention_v2", "multi_scale_deformable_attention")
    originals = [getattr(module, name) for module, name in zip(modules, names, strict=True)]

    def swap(model: nn.Module) -> None:
        for _ in range(50):
            done = dk.patch(model)
            assert sum(part.count for part in done.replaced) == 1
            dk.unpatch(model)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(swap, made))
    finally:
        sys.setswitchinterval(interval)
    assert [getattr(module, name) for module, name in zip(modules, names, strict=True)] == originals


def test_patched_model_that_lives_to_the_end_of_the_process() -> None:
    pytest.importorskip("transformers")
    program = (
        "from patched import attention; import deformkit as dk; layer, _ = attention('rt_detr_v2'); dk.patch(layer)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    assert done.stderr == ""


def test_twice(layer: tuple[nn.Module, dict[str, Any]]) -> None:
    host, arguments = layer
    first, second = dk.patch(host), dk.patch(host)
    assert first.replaced and not first.already
    assert not second.replaced and second.already == first.replaced
    assert str(second).startswith("already replaced 1 x transformers.models")
    assert ours(lambda: host(**arguments)) == {"ms_deform_attn": 1}
    dk.unpatch(host)
    assert not ours(lambda: host(**arguments))


def test_layer_with_a_forward_of_its_own_is_not_replaced() -> None:
    layer, _ = attention("deformable_detr")
    layer.attn.forward = lambda *args: None
    assert not dk.patch(layer, strict=False).replaced


def test_hooks_of_the_core_see_its_inputs() -> None:
    host, arguments = attention("deformable_detr")
    seen: list[tuple[Any, ...]] = []
    host.attn.register_forward_hook(lambda module, args, output: seen.append(args))
    host(**arguments)
    dk.patch(host)
    host(**arguments)
    theirs, ours = seen
    torch.testing.assert_close(list(ours), list(theirs))


@pytest.mark.parametrize("model_type", ["deformable_detr", "mask2former"])
def test_layer_of_another_release_is_not_replaced(model_type: str) -> None:
    """A layer whose forward takes unknown arguments: its core, a layer or a function, is still replaced."""
    host, arguments = attention(model_type)
    base: Any = type(host)

    def forward(self: Any, hidden_states: Tensor, rotation: Tensor | None = None) -> Tensor:
        return hidden_states

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward}
    host.__class__ = type(base.__name__, (base,), names)
    (replaced,) = dk.patch(host).replaced
    assert replaced.operator == "ms_deform_attn"
    assert (replaced.shared is None) == (model_type == "deformable_detr")
    assert ours(lambda: base.forward(host, **arguments)) == {"ms_deform_attn": 1}
    dk.unpatch(host)


# Refused models, and parts that are left alone


@pytest.mark.parametrize("maker", ["torch.compile", "torch.jit.script", "torch.fx"])
def test_a_model_in_which_a_compiler_left_nothing_to_replace(maker: str) -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    make = {"torch.compile": torch.compile, "torch.jit.script": torch.jit.script, "torch.fx": torch.fx.symbolic_trace}
    with pytest.raises(ValueError, match=rf"; part of it comes from .*{maker}.*: patch the model before that$"):
        dk.patch(nn.Sequential(make[maker](plain)))
    with pytest.raises(ValueError, match=r"with strict=False that is no error$"):
        dk.patch(plain)


def test_nothing_to_replace() -> None:
    model = nn.Sequential(nn.Linear(2, 2), dk.nn.DeformConv2d(2, 2, 3))
    with pytest.raises(ValueError, match="model is a Sequential without any deformable part of transformers, "):
        dk.patch(model)
    done = dk.patch(model, strict=False)
    assert not done.replaced and str(done) == "replaced nothing"
    dk.unpatch(done)


@pytest.mark.parametrize("model", [None, nn.Linear, "model"])
def test_no_module(model: Any) -> None:
    for function in (dk.patch, dk.unpatch):
        with pytest.raises(TypeError, match=f"model is a {type(model).__name__}; it must be a torch.nn.Module"):
            function(model)


def test_imports_nothing() -> None:
    program = """
import sys, torch, deformkit as dk
dk.patch(torch.nn.Linear(2, 2), strict=False)
assert not {"transformers", "torchvision", "mmcv", "ultralytics", "deformkit.compat"} & set(sys.modules)
assert dk.compat.__name__ == "deformkit.compat" and callable(dk.patch)
try:
    dk.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
