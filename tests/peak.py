"""The peak memory of this process since a moment."""

from pathlib import Path

import pytest


class Peak:
    """The peak memory of this process in MiB, less its memory at the start."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._read()
        except OSError:
            pytest.skip("the peak of memory can be reset on Linux only")

    def _read(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

    def so_far(self) -> int:
        return self._read() - self.start
