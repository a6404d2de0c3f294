import random

import fuzz
import pytest
import random_calls
import torch

from deformkit.ops._operator import operators


def test_random_calls() -> None:
    counts = fuzz.run(200, compare_every=1)
    assert counts["compared"] > 100 and counts["refused"] > 5


@pytest.mark.parametrize("name", random_calls.GENERATORS)
def test_a_kernel_refuses_what_the_check_refuses(name: str) -> None:
    """Public functions ask a kernel first, and the check only why the kernel refused; see ``Operator.checked_call``."""
    operator, wrong = operators[name], 0
    for seed in range(60):
        draw = random.Random(seed)
        torch.manual_seed(seed)
        args = random_calls.spoil(draw, random_calls.GENERATORS[name](draw).args)
        try:
            operator.check(*args)
        except (TypeError, ValueError):
            wrong += 1
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                operator.overload(*args)
    assert wrong > 20


def test_every_operator_has_a_generator() -> None:
    assert set(random_calls.GENERATORS) == {name for name in operators if not name.endswith("_backward")}
