"""Export to ONNX, in forms that every runtime runs or that are fast on some. Needs ``pip install deformkit[onnx]``."""

from ._export import Form as Form
from ._export import export as export
from ._report import Report as Report
from ._runtime import library as library
from ._translate import translation_table as translation_table
