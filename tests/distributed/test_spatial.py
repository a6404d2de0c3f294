"""Images and volumes that are cut along an axis among 2 and 4 processes."""

from pathlib import Path

import pytest
from ranks import on_ranks


@pytest.mark.parametrize("count", [2, 4])
def test_operators_on_a_part(count: int, tmp_path: Path) -> None:
    found = on_ranks(count, Path(__file__).with_name("spatial.py"), tmp_path)
    wrong = {name: error for name, error in found.items() if error}
    assert not wrong, wrong
    assert len(found) > {2: 40, 4: 80}[count]
