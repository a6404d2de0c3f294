import fuzz
import random_calls

from deformkit.ops._library import operators


def test_random_calls() -> None:
    counts = fuzz.run(200, compare_every=1)
    assert counts["compared"] > 100 and counts["refused"] > 5


def test_every_operator_has_a_generator() -> None:
    assert set(random_calls.GENERATORS) == {name for name in operators if not name.endswith("_backward")}
