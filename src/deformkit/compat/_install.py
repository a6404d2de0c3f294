"""Import shims: modules of deformkit that take the place of compiled extensions that do not build any more."""

import sys
from importlib import import_module
from types import ModuleType

# For each name that can be installed, the shim, and the submodules under which it is found too.
_SHIMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MultiScaleDeformableAttention": ("ms_deform_attn", ()),
    "groundingdino._C": ("ms_deform_attn", ()),
    "DCNv3": ("dcnv3", ()),
    "DCNv4": (
        "dcnv4",
        (
            "ext",
            "functions",
            "functions.dcnv4_func",
            "functions.flash_deform_attn_func",
            "modules",
            "modules.dcnv4",
            "modules.flash_deform_attn",
        ),
    ),
    "mmcv._ext": ("mmcv_ext", ()),
    # Before dcn_v2: where that is found as a file of the program itself, it imports _ext.
    "_ext": ("dcn_v2", ()),
    "dcn_v2": ("dcn_v2", ()),
    "DCN": ("dcn", ()),
    "D3D": ("dcn", ()),
    "deformable_aggregation_ext": ("deformable_aggregation", ()),
    "deformable_aggregation_with_depth_ext": ("deformable_aggregation", ()),
    "deform_attn": ("deform_attn", ()),
    "alt_cuda_corr": ("alt_cuda_corr", ()),
    "corr_sampler": ("corr_sampler", ()),
}

# For each installed name, the modules that the shim replaced, by their full names; None if there was none.
_replaced: dict[str, dict[str, ModuleType | None]] = {}


def install(*names: str, force: bool = False) -> tuple[str, ...]:
    """Let ``import <name>`` find deformkit in place of a missing compiled extension, so that old code runs unchanged.

    Call it before the first import of the program that needs the extension. The names are

    * ``"MultiScaleDeformableAttention"``: the extension of Deformable DETR, DINO, Mask2Former and others;
    * ``"groundingdino._C"``: the extension of Grounding DINO;
    * ``"DCNv3"``: the extension of InternImage;
    * ``"DCNv4"``: that package;
    * ``"mmcv._ext"``: the extension of mmcv, so that ``import mmcv.ops`` works with mmcv-lite;
    * ``"_ext"`` and ``"dcn_v2"``: the extension of DCNv2 (CenterNet and others), and its layers;
    * ``"DCN"`` and ``"D3D"``: the extensions of other DCNv2 projects, of NLSPN and of D3D;
    * ``"deformable_aggregation_ext"`` and ``"deformable_aggregation_with_depth_ext"``: those of Sparse4D and its
      descendants;
    * ``"deform_attn"``: the extension of RVRT;
    * ``"alt_cuda_corr"`` and ``"corr_sampler"``: the extensions of RAFT and RAFT-Stereo.

    Any of them may lie in a package of the program: ``"projects.mmdet3d_plugin.ops.deformable_aggregation_ext"``.

    A module that can be imported is not replaced; it is imported to find this out. A module whose import fails, because
    it was built for another torch or needs a GPU, is replaced.

    Args:
        names: the names to install; without arguments, all of them.
        force: whether to replace modules that can be imported too.

    Returns:
        The names under which deformkit is now found.

    Raises:
        ValueError: a name is none of these; nothing is installed.

    Example:
        >>> import deformkit.compat
        >>> deformkit.compat.install("MultiScaleDeformableAttention")
        ('MultiScaleDeformableAttention',)
        >>> import MultiScaleDeformableAttention
        >>> MultiScaleDeformableAttention.__name__
        'deformkit.compat._shims.ms_deform_attn'
        >>> deformkit.compat.uninstall()
        ('MultiScaleDeformableAttention',)
    """
    installed = []
    for name in _known(names) if names else list(_SHIMS):
        if name not in _replaced:
            if not force and _importable(name):
                continue
            shim, submodules = _entry(name)
            module = import_module(f"{__package__}._shims.{shim}")
            paths = (name, *(f"{name}.{submodule}" for submodule in submodules))
            _replaced[name] = {path: sys.modules.get(path) for path in paths}
            for path in paths:
                _put(path, module, name)
        installed.append(name)
    return tuple(installed)


def uninstall(*names: str) -> tuple[str, ...]:
    """Undo :func:`install`, so that ``import`` finds what it would find without deformkit.

    Code that has imported a shim keeps it.

    Args:
        names: what to take out; none: all.

    Returns:
        Those of the names behind which deformkit stood.

    Raises:
        ValueError: a name that :func:`install` does not know; then nothing is taken out.
    """
    removed = [name for name in (_known(names) if names else list(_replaced)) if name in _replaced]
    for name in removed:
        for path, module in _replaced.pop(name).items():
            _put(path, module, name)
    return tuple(removed)


def _entry(name: str) -> tuple[str, tuple[str, ...]]:
    """The shim and the submodules of a name, which may lie in a package of the program."""
    return _SHIMS[name if name in _SHIMS else name.rpartition(".")[2]]


def _known(names: tuple[str, ...]) -> list[str]:
    """The names in the order of the table; a ValueError if one is unknown."""
    order = list(_SHIMS)
    for name in names:
        if name not in _SHIMS and name.rpartition(".")[2] not in _SHIMS:
            raise ValueError(f"{name!r} cannot be installed; there are {', '.join(map(repr, _SHIMS))}")
    return sorted(set(names), key=lambda name: (order.index(name if name in _SHIMS else name.rpartition(".")[2]), name))


def _importable(name: str) -> bool:
    try:
        import_module(name)
    except Exception:
        # An extension that was built for something else fails in its own way: undefined symbols, no GPU, assertions.
        return False
    return True


def _put(path: str, module: ModuleType | None, name: str) -> None:
    """Let ``import path`` find ``module``, or nothing if it is None; ``path`` is ``name`` or a submodule of it."""
    sys.modules.pop(path, None)
    if module is not None:
        sys.modules[path] = module
    # "from groundingdino import _C" asks the package first, if that was imported already.
    parent, _, child = path.rpartition(".")
    package = sys.modules.get(parent)
    if package is not None and path == name:
        if module is not None:
            setattr(package, child, module)
        else:
            vars(package).pop(child, None)
