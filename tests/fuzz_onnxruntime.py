"""Random models of one node in ONNX Runtime: most of them have something wrong, which has to be an error and no crash.

``python tests/fuzz_onnxruntime.py --models 2000 --library build/sanitize-memory/lib/deformkit_onnxruntime.so`` runs
them with the library there. After a failure ``--seed N --models 1`` repeats its model alone.
"""

import argparse
import random
from typing import Any

import fuzz
import nodes
import random_calls
import torch
from torch import Tensor

HUGE = (2**40, 2**62, 2**63 - 1, -(2**63))


def run_one(seed: int, library: str | None = None, compare: bool = True) -> str:
    """Run one random model and return its outcome. Raises an AssertionError if a result is wrong."""
    from deformkit._testing import assert_close
    from deformkit.ops._operator import operators

    draw = random.Random(seed)
    torch.manual_seed(seed)
    name = draw.choice(list(random_calls.GENERATORS))
    call, operator = random_calls.GENERATORS[name](draw), operators[name]
    args, hostile = nodes.as_stored(call.args), draw.random() < 0.7
    if hostile and draw.random() < 0.4:
        args = random_calls.spoil(draw, args, devices=())
    inputs, attributes = nodes.inputs_of(operator, args), nodes.attributes_of(operator, args)
    result = args[0].dtype
    if hostile:
        draw.choice((spoil_input, spoil_input, spoil_attribute))(draw, inputs, attributes)
    try:
        made = nodes.model(name, inputs, attributes, result)
        found = nodes.run(made, inputs, draw.randint(1, 3), library).to(result)
    except Exception as error:
        # onnxruntime has its own types of errors, which are derived from Exception alone.
        assert hostile and "onnxruntime" in type(error).__module__, error
        return "refused"
    if hostile:
        return "accepted"
    if not call.undefined:
        assert found.isfinite().all(), "the output is not finite although every coordinate is a number"
    if compare:
        truth = operator.reference(*[value.double() if isinstance(value, Tensor) else value for value in args])
        assert_close(found, truth, operator.reference(*args), "output")
    return "compared"


def spoil_input(draw: random.Random, inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Leave an input out, add one, or change its dtype, its axes or its values."""
    name = draw.choice([name for name, value in inputs.items() if value is not None])
    value = inputs[name]
    what = draw.randrange(6)
    if what == 0:
        inputs[name] = None
    elif what == 1:
        inputs["more"] = value
    elif what == 2:
        inputs[name] = value.to(draw.choice(list(nodes.DTYPES)))
    elif what == 3:
        inputs[name] = draw.choice((value.new_ones(()), value[:0], value[None], value.flatten()))
    elif what == 4:
        inputs[name] = torch.full_like(value, draw.choice(HUGE) if value.dtype == torch.int64 else torch.nan)
    else:
        inputs[name] = torch.zeros(draw.choice(([0], [1] * 6, [1] * 9, [3, 0, 2], [1])), dtype=value.dtype)


def spoil_attribute(draw: random.Random, inputs: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Leave an attribute out, or change its type, its length or its values."""
    name = draw.choice(list(attributes))
    value = attributes[name]
    number = draw.choice((0, -1, 7, *HUGE))
    if draw.random() < 0.2:
        del attributes[name]
    elif isinstance(value, list | tuple):
        attributes[name] = draw.choice(([], [number] * len(value), [*value, 1], 1.5, "text", [0.5], number))
    else:
        attributes[name] = draw.choice((number, [number], [], float("nan"), 1e30, "text"))


def run(models: int, seed: int = 0, library: str | None = None, compare_every: int = 1) -> dict[str, int]:
    """Run random models and count their outcomes. The first wrong result raises an error with its seed."""

    def once(number: int) -> str:
        return run_one(number, library, (number - seed) % compare_every == 0)

    return fuzz.outcomes(models, seed, False, once)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description="Random models of one node in ONNX Runtime.")
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", help="of the operators; by default that of deformkit")
    options = parser.parse_args()
    print(run(options.models, options.seed, options.library))


if __name__ == "__main__":
    main()
