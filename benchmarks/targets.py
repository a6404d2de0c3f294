"""The targets of each table: for each rival two numbers, forward and forward + backward.

For ``plain`` the number is the largest allowed multiple of its time; for every other rival, the required speed-up of
deformkit. A table meets a target by its geometric mean.
"""

from dataclasses import dataclass

# One would first try to compile the slow reference.
COMPILED = (3.0, 3.0)


@dataclass(frozen=True)
class Table:
    operator: str
    title: str
    cases: tuple[str, ...]
    targets: dict[str, tuple[float, float]]


TABLES = [
    Table(
        "deform_conv",
        "deform_conv2d with mask, 3x3",
        (
            "2d 64x128x128",
            "2d 128x64x64",
            "2d 256x56x84",
            "2d 256x32x32",
            "2d 512x25x42",
        ),
        {"plain": (1.15, 1.15), "compiled": COMPILED},
    ),
    Table(
        "deform_conv",
        "deform_conv2d with mask, 3x3, 8 offset groups",
        ("2d 64x180x320 og8",),
        {"plain": (1.6, 1.6), "compiled": COMPILED},
    ),
    Table(
        "deform_conv",
        "deform_conv2d with mask, 7x7",
        ("2d k7 64x64x64",),
        {"torchvision": (8, 15), "plain": (1.25, 1.25), "compiled": COMPILED},
    ),
    Table(
        "deform_conv",
        "deform_conv1d, long kernel",
        ("1d k16 d3 L128",),
        {"dc1d": (4, 4), "plain": (1.05, 1.0), "compiled": COMPILED},
    ),
    Table(
        "deform_conv", "deform_conv1d", ("1d k5 L1024",), {"dc1d": (5, 5), "plain": (1.05, 1.05), "compiled": COMPILED}
    ),
    Table(
        "deform_conv",
        "deform_conv1d, depthwise, offsets per channel",
        ("1d depthwise",),
        {"dc1d": (20, 12), "compiled": COMPILED},
    ),
    Table(
        "deform_conv",
        "deform_conv3d with mask, 3x3x3",
        ("3d 32x16x32x32", "3d 64x8x28x28"),
        {"reference": (10, 10), "plain": (2, 2), "compiled": COMPILED},
    ),
    Table(
        "ms_deform_attn",
        "ms_deform_attn, decoder",
        ("2d decoder",),
        {"transformers": (20, 12), "compiled": COMPILED},
    ),
    Table(
        "ms_deform_attn",
        "ms_deform_attn, encoder",
        ("2d encoder", "2d encoder, detection"),
        {"transformers": (30, 18), "compiled": COMPILED},
    ),
    Table(
        "ms_deform_attn",
        "ms_deform_attn, large maps",
        ("2d large maps",),
        {"compiled": COMPILED},
    ),
    Table(
        "ms_deform_attn",
        "ms_deform_attn, 3-D and 1-D",
        ("3d", "1d"),
        {"reference": (10, 6), "compiled": COMPILED},
    ),
    Table(
        "deform_aggregate",
        "deform_aggregate, 3x3",
        ("2d 128x56x56", "2d 512x14x14", "2d 256x100x160"),
        {"grid_sample": (15, 10), "compiled": COMPILED},
    ),
    Table(
        "deform_aggregate",
        "deform_aggregate, 1-D and 3-D",
        ("1d 256x2048", "3d 64x16x32x32"),
        {"compiled": COMPILED},
    ),
    Table(
        "deform_roi_pool",
        "deform_roi_pool, 500 RoIs",
        ("2d 500 RoIs",),
        {"reference": (10, 8), "compiled": COMPILED},
    ),
    Table(
        "deform_roi_pool",
        "deform_roi_pool, adaptive, 1-D and 3-D",
        ("2d 100 RoIs adaptive", "1d 200 segments", "3d 50 cuboids"),
        {"reference": (10, 8), "compiled": COMPILED},
    ),
    Table(
        "deform_sample",
        "deform_sample, images",
        ("2d 64x256x256", "2d 64x256x256 anywhere"),
        {"grid_sample": (3, 4)},
    ),
    Table(
        "deform_sample",
        "deform_sample, volumes",
        ("3d one channel 160x192x160", "3d 16x64x64x64", "3d 16x64x64x64 anywhere"),
        {"grid_sample": (6, 8)},
    ),
    Table(
        "deform_sample",
        "deform_sample, a batch of eight",
        ("2d 8 images 64x64x64", "2d 8 images 3x224x224", "3d 8 volumes 1x32x64x64"),
        {"grid_sample": (1, 1)},
    ),
    Table(
        "deform_conv_transpose",
        "deform_conv_transpose with mask",
        ("2d 128x64x64", "2d 256x32x32", "2d 64x128x128", "1d 128x1024", "3d 32x8x28x28"),
        {"plain": (1.3, 1.3)},
    ),
    Table(
        "deform_correlate",
        "deform_correlate",
        ("2d lookup", "2d guided"),
        {"grid_sample": (8, 8)},
    ),
    Table(
        "deform_splat",
        "deform_splat",
        ("2d 64x256x256", "2d 64x256x256 anywhere", "1d 64x4096", "3d 16x64x64x64"),
        {"index_add": (10, 10)},
    ),
    Table(
        "layers",
        "guided attention and aggregation of views, at given points",
        ("guided attention at points", "aggregation of views at points"),
        {"torch": (10, 10)},
    ),
]

HALF = {"bfloat16": 1.0, "float16": 1.1}
"""The most that half precision may take of float32's time, as the geometric mean over an operator's cases."""

HALF_OF_PRODUCTS = 0.65
"""The same for convolutions in bfloat16 with the kernels for AVX-512, on processors that multiply it."""

WORKSPACE = 64 * 2**20
"""Bytes beyond inputs, outputs and gradients, at any size."""

LINEAR = 0.10
"""How far time may stray from growing with the work, from 2 to 16 times."""

THREADS = 1.8
"""How much faster two threads are than one."""

OVERHEAD = {"without gradients": 30e-6, "with gradients": 80e-6}
"""Seconds of a small call over its kernel."""

MODELS = {"deformable_detr": {"forward": 2.0}}
"""How many times faster a patched model is, by its name and pass."""
