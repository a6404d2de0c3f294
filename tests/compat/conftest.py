import sys
from collections.abc import Iterator

import pytest

from deformkit import compat
from deformkit.compat._install import _SHIMS


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """No shim is installed before and after a test."""
    compat.uninstall()
    before = set(sys.modules)
    yield
    compat.uninstall()
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {entry.split(".")[0] for entry in _SHIMS} - {"mmcv"}:
            del sys.modules[name]
