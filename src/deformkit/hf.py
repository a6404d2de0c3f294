"""Layers of deformkit for ``set_use_kernels`` of transformers. Needs transformers and the package kernels."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from ._patching.hosts import transformers_layer

LAYER = "MultiScaleDeformableAttention"
DEVICES = ("cpu", "cuda")


class MultiScaleDeformableAttention(nn.Module):
    """The layer of transformers with the forward of :func:`deformkit.ms_deform_attn`."""

    can_torch_compile = True
    forward = transformers_layer


class _Repository:
    """Where the package kernels finds the layer: here, and not on a server."""

    layer_name = LAYER

    def load(self) -> type[nn.Module]:
        return MultiScaleDeformableAttention

    def __str__(self) -> str:
        return f"deformkit.hf, layer {self.layer_name}"


_ours = _Repository()
# What transformers had for each device, while ours is registered.
_before: dict[str, Any] = {}


def register() -> None:
    """Let ``model.set_use_kernels(True)`` of transformers take the multi-scale deformable attention of deformkit.

    Afterwards every model with a layer ``MultiScaleDeformableAttention`` uses :func:`deformkit.ms_deform_attn` on CPUs
    and CUDA devices once ``model.set_use_kernels(True)`` is called, whether it was created before or later. Outputs are
    the same up to rounding. A second call changes nothing.

    :func:`deformkit.patch` replaces more of a model, works with every model that it names, and needs no other package.

    Raises:
        ImportError: transformers is missing, or does not use the package kernels: that is missing, has a version that
            transformers does not accept, or is switched off by the variable ``USE_HUB_KERNELS``.

    Example:
        >>> from deformkit import hf
        >>> hf.register()  # doctest: +SKIP
        >>> model.set_use_kernels(True)  # doctest: +SKIP
    """
    kernels, mapping = _packages()
    # transformers registers its own mapping at each call of set_use_kernels, which would replace ours on its devices.
    theirs = mapping.setdefault(LAYER, {})
    for device in DEVICES:
        if theirs.get(device) is not _ours:
            _before[device] = theirs.get(device)
            theirs[device] = _ours
    kernels.register_kernel_mapping({LAYER: dict.fromkeys(DEVICES, _ours)})


def unregister() -> None:
    """Undo :func:`register`; without one, nothing happens.

    Models that use the layer keep it until the next ``model.set_use_kernels(True)``.

    Example:
        >>> from deformkit import hf
        >>> hf.unregister()
    """
    if not _before:
        return
    kernels, mapping = _packages()
    for device, repository in _before.items():
        mapping[LAYER].pop(device, None)
        if repository is not None:
            mapping[LAYER][device] = repository
    # A device cannot be removed, but an empty choice leaves the layer as it is.
    kernels.register_kernel_mapping({LAYER: {device: known or {} for device, known in _before.items()}})
    _before.clear()


def _packages() -> tuple[Any, dict[str, Any]]:
    """The package kernels and the mapping of transformers, or an ImportError that says what to install."""
    try:
        hub = import_module("transformers.integrations.hub_kernels")
    except ImportError as error:
        raise ImportError(f"deformkit.hf needs transformers: pip install transformers ({error})") from error
    # Where transformers does not accept the package kernels, its decorator does nothing, and says nothing.
    probe = hub.use_kernel_forward_from_hub(LAYER)(type("Probe", (nn.Module,), {}))
    if not hasattr(probe, "kernel_layer_name") or not hasattr(hub, "get_kernel_mapping_transformers"):
        raise ImportError(_reason(hub))
    return import_module("kernels"), hub.get_kernel_mapping_transformers()


def _reason(hub: Any) -> str:
    release, installed = f"transformers {_version('transformers')}", _version("kernels")
    least, most = getattr(hub, "KERNELS_MIN_VERSION", None), getattr(hub, "KERNELS_MAX_VERSION", None)
    accepted = f"kernels>={least},<{most}"
    if not hasattr(hub, "is_kernels_available") or least is None or most is None:
        found, cure = "has no mapping of kernels that can be changed", "pip install 'transformers>=5.22'"
    elif installed is None:
        found, cure = f"needs {accepted}, which is missing", f"pip install '{accepted}'"
    elif not hub.is_kernels_available():
        found, cure = f"needs {accepted} and ignores kernels {installed}", f"pip install '{accepted}'"
    else:
        found, cure = "ignores the package kernels because of the variable USE_HUB_KERNELS", "unset USE_HUB_KERNELS"
    return f"{release} {found}: {cure} and restart Python, or call deformkit.patch(model), which needs neither"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
