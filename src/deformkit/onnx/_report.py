"""What an ONNX file contains, and which runtimes run it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """What :func:`export` has written.

    Attributes:
        path: of the file.
        form: that was asked for.
        opset: the version of the standard operators.
        operators: how often each operator occurs in the graph; those of deformkit as ``deformkit.deform_conv``.
        inside: likewise, in the functions that the file contains for the operators of deformkit.
        alone: how often operators of deformkit occur for which the file contains no function.
    """

    path: Path
    form: str
    opset: int
    operators: dict[str, int] = field(default_factory=dict)
    inside: dict[str, int] = field(default_factory=dict)
    alone: dict[str, int] = field(default_factory=dict)

    @property
    def runtimes(self) -> dict[str, str]:
        """For each runtime, whether it has the operators of the file.

        deformkit is tested with ONNX Runtime and OpenVINO; what is said of TensorRT is what it states itself.
        """
        ours = any(name.startswith("deformkit.") for name in self.operators)
        convolves, samples = "DeformConv" in self.operators, "GridSample" in self.operators
        found = {"ONNX Runtime": "yes, from 1.25 on" if convolves else "yes", "OpenVINO": "yes", "TensorRT": "yes"}
        if ours:
            found["ONNX Runtime"] = "yes; faster with the library at deformkit.onnx.library()"
            found["OpenVINO"] = "by deformkit.openvino.convert()"
            found["TensorRT"] = "after onnx.inliner.inline_local_functions"
        if convolves:
            found["OpenVINO"] = "with the rules of deformkit.openvino.extensions()"
            found["TensorRT"] = "yes, from 10.1 on"
        if samples and self.opset >= 20:
            found["TensorRT"] = "no: it takes GridSample of opset 20 for nearest"
        if self.alone:
            reason = f"no: {', '.join(self.alone)} without a function; RoI pooling needs a sampling_ratio of at least 1"
            found = {
                "ONNX Runtime": "with the library at deformkit.onnx.library()",
                "OpenVINO": reason,
                "TensorRT": reason,
            }
        return found

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.operators.items()))
        lines = [f"{self.path}: opset {self.opset}, form {self.form!r}", f"operators: {counts}"]
        if self.inside:
            lines.append("in functions: " + ", ".join(f"{name} {count}" for name, count in sorted(self.inside.items())))
        return "\n".join([*lines, *(f"{name}: {verdict}" for name, verdict in self.runtimes.items())])


def counted(nodes: Any) -> dict[str, int]:
    """How often each operator occurs in a graph or function of onnx_ir."""
    return dict(Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes))
