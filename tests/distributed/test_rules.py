"""The operators on tensors that are divided among 2 and 4 processes."""

from pathlib import Path

import pytest
from ranks import on_ranks


@pytest.mark.parametrize("count", [2, 4])
def test_every_rule_of_every_operator(count: int, tmp_path: Path) -> None:
    """Outputs and gradients are those of one process, and no rule is left for another."""
    found = on_ranks(count, Path(__file__).with_name("rules.py"), tmp_path)
    wrong = {name: error for name, error in found.items() if error}
    assert not wrong, wrong
    assert len(found) > {2: 40, 4: 100}[count]


def test_layers_whose_channels_are_divided(tmp_path: Path) -> None:
    found = on_ranks(2, Path(__file__).with_name("layers.py"), tmp_path)
    wrong = {name: error for name, error in found.items() if error}
    assert not wrong, wrong
