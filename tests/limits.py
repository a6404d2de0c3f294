"""Limits to what a process may take."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def address_space(room: int) -> Iterator[None]:
    """Inside, allocations fail that need more than ``room`` MiB beyond the address space of the beginning."""
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmSize:")[1].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + room * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
