"""The texts of schemas. It imports nothing, because the build reads it to generate the schemas of the C++ library."""


def argument_names(schema: str) -> list[str]:
    """The names of the arguments in a schema as ``define`` takes it."""
    return [argument.split()[-1] for argument in _arguments(schema).split(", ")]


def backward_schema(schema: str, gradients: int) -> str:
    """The schema of the backward of the operator ``schema``, which returns this number of gradients."""
    name, results = schema.split("(", 1)[0], ", ".join(["Tensor"] * gradients)
    return f"{name}_backward(Tensor grad_output, {_arguments(schema)}, bool[] output_mask) -> ({results})"


def _arguments(schema: str) -> str:
    return schema.split("(", 1)[1].rsplit(") ->", 1)[0]
