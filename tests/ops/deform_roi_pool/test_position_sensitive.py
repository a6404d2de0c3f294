"""Position-sensitive pooling is compared with the published formula, and with pooling each group of channels alone."""

from itertools import product
from math import prod
from typing import Any

import published
import pytest
import torch
from torch import nn

import deformkit as dk
from deformkit._testing import assert_close, assert_equal
from deformkit.compat._shims._pooling import (
    DCNPooling,
    dcn_v2_pooling,
    psroi_pooling_backward,
    psroi_pooling_forward,
)
from deformkit.ops.deform_roi_pool.cases import CASES, Case

GROUPED = [case for case in CASES if case.group_size]


@pytest.mark.parametrize(
    ("groups", "parts", "classes", "no_trans"),
    [(1, 3, 1, False), (3, 3, 2, False), (2, 1, 1, False), (2, 2, 2, False), (3, 3, 1, True)],
)
def test_agrees_with_the_published_formula(groups: int, parts: int, classes: int, no_trans: bool) -> None:
    torch.manual_seed(groups + 10 * parts + 100 * classes)
    input = torch.randn(2, 2 * groups**2, 6, 7, dtype=torch.float64)
    rois = torch.tensor([[0, 1.5, 2, 9.4, 7], [1, -3, 4.2, 5, 18], [1, 11, 9, 13.7, 8], [0, 6, 3, 6, 3]]).double()
    offset = torch.randn(4, 2 * classes, parts, parts, dtype=torch.float64)
    numbers: tuple[Any, ...] = (0.5, 3, 2, groups, parts, 2, 0.2)
    found = []
    for ours in (True, False):
        leaves = [input.clone().requires_grad_(), offset.clone().requires_grad_()]
        scale, pooled, channels, *rest = numbers
        if ours:
            output = dcn_v2_pooling(leaves[0], rois, leaves[1], scale, pooled, channels, no_trans, *rest)
        else:
            trans = None if no_trans else leaves[1]
            output = published.position_sensitive_pool(leaves[0], rois, trans, *numbers)
        cotangent = torch.sin(torch.arange(output.numel(), dtype=torch.float64)).reshape(output.shape)
        found.append([output.detach(), *torch.autograd.grad(output, leaves[: 2 - no_trans], cotangent)])
    assert found[0][0].count_nonzero() > 40
    last = (int(no_trans), scale, channels, groups, pooled, *rest[1:])
    output, count = psroi_pooling_forward(input, rois, offset, *last)
    by_input, by_offset = psroi_pooling_backward(cotangent, input, rois, offset, count, *last)
    found.append([output, by_input] if no_trans else [output, by_input, by_offset])
    for one, other, bare in zip(*found, strict=True):
        assert_close(one, other)
        assert_equal(bare, one)


@pytest.mark.parametrize("case", GROUPED, ids=lambda c: c.name)
def test_a_bin_reads_its_group_of_channels(case: Case) -> None:
    named = case.arguments(torch.float64)
    output = dk.deform_roi_pool(**named)
    groups = prod(case.group_size)
    for bin in product(*map(range, case.output_size)):
        group = 0
        for place, size, count in zip(bin, case.output_size, case.group_size, strict=True):
            group = group * count + place * count // size
        alone = {**named, "input": named["input"][:, group::groups], "group_size": 1}
        assert_equal(output[(..., *bin)], dk.deform_roi_pool(**alone)[(..., *bin)])


def test_samples_outside_are_left_out_of_the_mean() -> None:
    """Of four samples at -1, 0, 1 and 2, the first is more than half a pixel outside."""
    input = torch.tensor([[[3.0, 5.0, 10.0]]])
    rois = torch.tensor([[0.0, -1.0, 3.0], [0.0, -9.0, -7.0]])
    options: dict[str, Any] = {"output_size": 1, "sampling_ratio": 4}
    assert dk.deform_roi_pool(input, rois, group_size=1, **options).flatten().tolist() == [6.0, 0.0]
    assert dk.deform_roi_pool(input, rois, **options).flatten().tolist() == [5.25, 0.0]


@pytest.mark.parametrize("group_size", [None, 2])
def test_each_offset_group_moves_its_channels(group_size: int | None) -> None:
    case = Case("offset groups", 2, 6, (7, 9), 4, (2, 3), group_size=(2, 2) if group_size else ())
    named = {**case.arguments(torch.float64), "group_size": group_size}
    offset = torch.randn(4, 3 * 2, 2, 3, dtype=torch.float64)
    output = dk.deform_roi_pool(**{**named, "offset": offset})
    for k, (channels, one) in enumerate(zip(named["input"].chunk(3, 1), offset.chunk(3, 1), strict=True)):
        alone = dk.deform_roi_pool(**{**named, "input": channels, "offset": one})
        assert_equal(output[:, 2 * k : 2 * k + 2], alone)


@pytest.mark.parametrize("group_size", [None, 2])
def test_offset_groups_without_rois(group_size: int | None) -> None:
    input = torch.randn(2, 24, 7, 9, requires_grad=True)
    rois, offset = torch.zeros(0, 5), torch.zeros(0, 3 * 2, 4, 5, requires_grad=True)
    output = dk.deform_roi_pool(input, rois, offset, output_size=(4, 5), group_size=group_size)
    assert output.shape == (0, 6 if group_size else 24, 4, 5)
    grad_input, grad_offset = torch.autograd.grad(output.sum(), (input, offset))
    assert grad_input.shape == input.shape and not grad_input.any()
    assert grad_offset.shape == offset.shape


def test_errors_name_the_argument() -> None:
    named = Case("errors", 1, 6, (7, 9), 4, (2, 3), with_offset=False).arguments()
    for group_size, text in ((2, "input has 6 channels; with a group_size of 2x2 they must be a multiple of 4"),
                             (0, "group_size is 0"), ((2, 1, 1), r"group_size is \(2, 1, 1\)")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            dk.deform_roi_pool(**{**named, "group_size": group_size})
    with pytest.raises(ValueError, match=r"offset has shape \[4, 8, 2, 3\]; it must be \[4, 2, 2, 3\]"):
        dk.deform_roi_pool(**{**named, "offset": torch.zeros(4, 8, 2, 3)})


def test_the_layers() -> None:
    """A new ``PackedDeformRoIPool`` halves the plain means, as a new ``DCNPooling`` does."""
    layer = dk.nn.PackedDeformRoIPool(3, 2, 8, 0.5, 2, modulated=True, group_size=3)
    input, rois = torch.randn(2, 18, 6, 7), torch.tensor([[0.0, 1, 2, 9, 7], [1, -3, 4, 5, 11]])
    plain = dk.nn.DeformRoIPool(3, 0.5, 2, group_size=3)
    assert repr(plain).endswith("sampling_ratio=2, gamma=0.1, group_size=[3, 3])")
    assert_equal(layer(input, rois), plain(input, rois) / 2)
    with pytest.raises(ValueError, match=r"input has 36 channels; .* output_channels=2 and group_size=\(3, 3\)"):
        layer(torch.randn(2, 36, 6, 7), rois)

    theirs = DCNPooling(0.5, 3, 2, False, 3, None, 2, 0.1, 8)
    assert [tuple(t.shape) for t in theirs.state_dict().values()] == [(8, 18), (8,), (8, 8), (8,), (27, 8), (27,)]
    nn.init.normal_(theirs.offset_mask_fc[4].bias)
    first = dcn_v2_pooling(input, rois, input.new_empty(0), 0.5, 3, 2, True, 3, None, 2)
    predicted = theirs.offset_mask_fc(first.flatten(1)).reshape(2, 3, 3, 3)
    moved = dcn_v2_pooling(input, rois, predicted[:, :2], 0.5, 3, 2, False, 3, None, 2, 0.1)
    assert_equal(theirs(input, rois), moved * predicted[:, 2:].sigmoid())
