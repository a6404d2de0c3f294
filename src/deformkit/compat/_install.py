"""Import shims: modules of deformkit that take the place of compiled extensions that do not build any more."""

import sys
from importlib import import_module
from types import ModuleType

# For each name that can be installed, the shim, and the submodules under which it is found too.
_SHIMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MultiScaleDeformableAttention": ("ms_deform_attn", ()),
    "groundingdino._C": ("ms_deform_attn", ()),
    "DCNv3": ("dcnv3", ()),
    "DCNv4": ("dcnv4", ("ext", "functions", "functions.dcnv4_func", "modules", "modules.dcnv4")),
    # Before dcn_v2: where that is found as a file of the program itself, it imports _ext.
    "_ext": ("dcn_v2", ()),
    "dcn_v2": ("dcn_v2", ()),
}

# The module that a shim replaced, by its full name; None if there was none.
_replaced: dict[str, ModuleType | None] = {}


def install(*names: str, force: bool = False) -> tuple[str, ...]:
    """Let ``import <name>`` find deformkit in place of a missing compiled extension, so that old code runs unchanged.

    Call it before the first import of the program that needs the extension. The names are

    * ``"MultiScaleDeformableAttention"``: the extension of Deformable DETR, DINO, Mask2Former and others;
    * ``"groundingdino._C"``: the extension of Grounding DINO;
    * ``"DCNv3"``: the extension of InternImage;
    * ``"DCNv4"``: that package, without its attention;
    * ``"_ext"`` and ``"dcn_v2"``: the extension of DCNv2 (CenterNet and others), and its layers.

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
    for name in _known(names):
        if name not in _replaced:
            if not force and _importable(name):
                continue
            shim, submodules = _SHIMS[name]
            module = import_module(f"{__package__}._shims.{shim}")
            for path in (name, *(f"{name}.{submodule}" for submodule in submodules)):
                _replaced[path] = sys.modules.get(path)
                _put(path, module)
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
    removed = [name for name in _known(names) if name in _replaced]
    for name in removed:
        for path in [path for path in _replaced if path == name or path.startswith(f"{name}.")]:
            _put(path, _replaced.pop(path))
    return tuple(removed)


def _known(names: tuple[str, ...]) -> list[str]:
    """The names to install, in the order of the table; a ValueError if one is unknown."""
    for name in names:
        if name not in _SHIMS:
            raise ValueError(f"{name!r} cannot be installed; there are {', '.join(map(repr, _SHIMS))}")
    return [name for name in _SHIMS if not names or name in names]


def _importable(name: str) -> bool:
    try:
        import_module(name)
    except Exception:
        # An extension that was built for something else fails in its own way: undefined symbols, no GPU, assertions.
        return False
    return True


def _put(path: str, module: ModuleType | None) -> None:
    """Let ``import path`` find ``module``, or nothing if it is None."""
    sys.modules.pop(path, None)
    if module is not None:
        sys.modules[path] = module
    # "from groundingdino import _C" asks the package first, if that was imported already.
    parent, _, child = path.rpartition(".")
    package = sys.modules.get(parent)
    if package is not None and parent.split(".")[0] not in _SHIMS:
        if module is not None:
            setattr(package, child, module)
        else:
            vars(package).pop(child, None)
