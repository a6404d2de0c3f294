"""The cases, the evaluation and the tolerance that the self-test, ``verify``, the tests and the benchmarks share."""

from .evaluate import evaluate as evaluate
from .tolerance import FLOOR as FLOOR
from .tolerance import LEAST as LEAST
from .tolerance import assert_close as assert_close
from .tolerance import assert_equal as assert_equal
from .tolerance import compare as compare
from .tolerance import half_of_digits as half_of_digits
