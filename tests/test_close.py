"""The tolerance rule itself: the errors that it accepts and rejects."""

import pytest
import torch

from deformkit._testing import FLOOR, assert_close, assert_equal

TRUTH = torch.linspace(-3, 5, 100, dtype=torch.float64)


def test_rounding_passes(dtype: torch.dtype) -> None:
    assert_close(TRUTH.to(dtype), TRUTH)


def test_twice_the_error_of_the_reference_passes_and_more_does_not(dtype: torch.dtype) -> None:
    error = 100 * FLOOR[dtype]
    reference = (TRUTH + error).to(dtype)
    assert_close((TRUTH - 1.9 * error).to(dtype), TRUTH, reference)
    with pytest.raises(AssertionError, match="off by"):
        assert_close((TRUTH - 2.3 * error).to(dtype), TRUTH, reference)


def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    wrong = TRUTH.clone()
    wrong[50] += 20 * FLOOR[dtype]
    wrong = wrong.to(dtype)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(wrong, TRUTH)


def test_a_lower_precision_inside_fails() -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_close(TRUTH.to(torch.bfloat16).float(), TRUTH)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(TRUTH.float().double(), TRUTH)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_must_be_in_the_expected_places(special: float) -> None:
    marked = TRUTH.clone()
    marked[3] = special
    assert_close(marked, marked)
    for actual, truth in ((TRUTH, marked), (marked, TRUTH), (-marked.roll(1), marked)):
        with pytest.raises(AssertionError, match="elements that are"):
            assert_close(actual, truth)


def test_shapes_and_dtypes_have_to_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(TRUTH, TRUTH[None])
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(TRUTH.float(), TRUTH, TRUTH.half())
    with pytest.raises(AssertionError, match="float64"):
        assert_close(TRUTH.float(), TRUTH.float())


def test_equal_is_of_bits() -> None:
    marked = torch.tensor([1.0, torch.nan])
    assert_equal(marked, marked.clone())
    with pytest.raises(AssertionError, match="differs in 1 of 2"):
        assert_equal(marked, torch.tensor([1.0000001, torch.nan]))


def test_fresh_memory_is_nan() -> None:
    for fresh in (torch.empty(3), torch.ones(2).new_empty(4), torch.empty_like(torch.ones(2, 3))):
        assert fresh.isnan().all()
