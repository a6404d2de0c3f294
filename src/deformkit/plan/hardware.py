"""What data sheets say of the hardware that plans are made for."""

from typing import NamedTuple


class Hardware(NamedTuple):
    """One GPU, and how it is connected in the system of its maker.

    Attributes:
        title: the name of the GPU.
        matrix: operations per second of matrix products by dtype, dense, as the data sheet states them.
        vector: operations per second of all else, in float32.
        memory: bytes of memory.
        bandwidth: bytes per second of memory.
        link: bytes per second in one direction to the other GPUs of a machine.
        network: bytes per second in one direction to other machines, for each GPU.
        together: GPUs in one machine.
        source: the data sheets.
    """

    title: str
    matrix: dict[str, float]
    vector: float
    memory: float
    bandwidth: float
    link: float
    network: float
    together: int
    source: str


HARDWARE = {
    "a100": Hardware(
        "NVIDIA A100 80GB SXM",
        {"float32": 19.5e12, "bfloat16": 312e12},
        19.5e12,
        80e9,
        2039e9,
        300e9,
        25e9,
        8,
        "NVIDIA A100 Tensor Core GPU data sheet; DGX A100 data sheet (NVLink 600 GB/s both ways, 200 Gb/s per GPU)",
    ),
    "h100": Hardware(
        "NVIDIA H100 SXM",
        {"float32": 67e12, "bfloat16": 989.5e12},
        67e12,
        80e9,
        3350e9,
        450e9,
        50e9,
        8,
        "NVIDIA H100 Tensor Core GPU data sheet; DGX H100 data sheet (NVLink 900 GB/s both ways, 400 Gb/s per GPU)",
    ),
    "h200": Hardware(
        "NVIDIA H200 SXM",
        {"float32": 67e12, "bfloat16": 989.5e12},
        67e12,
        141e9,
        4800e9,
        450e9,
        50e9,
        8,
        "NVIDIA H200 Tensor Core GPU data sheet; DGX H200 data sheet (NVLink 900 GB/s both ways, 400 Gb/s per GPU)",
    ),
}
"""By the name that the command line takes. The bfloat16 figures of the sheets with sparsity are halved."""
