"""Shift, mask and layout."""

from __future__ import annotations

import torch

from fastdpo.batch import flat_targets, sequence_bounds, shift_labels


def test_shift_padded() -> None:
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    assert shift_labels(labels).tolist() == [[6, -100, -100], [8, 9, -100]]
    assert shift_labels(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_shift_packed_does_not_cross_sequences() -> None:
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    bounds = torch.tensor([0, 2, 2, 5, 6])  # lengths 2, 0, 3, 1
    assert shift_labels(labels, -100, bounds).tolist() == [2, -100, 4, 5, -100, -100]
    assert shift_labels(labels[None], -100, bounds).tolist() == [[2, -100, 4, 5, -100, -100]]
    ends_empty = torch.tensor([0, 0, 6, 6, 6])
    assert shift_labels(labels, -100, ends_empty).tolist() == [2, 3, 4, 5, 6, -100]


def test_targets() -> None:
    assert flat_targets(torch.tensor([[3, -100], [0, 2]]), 4).tolist() == [3, -1, 0, 2]
    assert flat_targets(torch.tensor([9, 1], dtype=torch.int32), 4, ignore_index=9).tolist() == [-1, 1]
    # a label that is both a token and the ignore_index does not count
    assert flat_targets(torch.tensor([0, 1]), 4, ignore_index=0).tolist() == [-1, 1]


def test_bounds() -> None:
    assert sequence_bounds(torch.zeros(4, 3).long(), None).tolist() == [0, 3, 6, 9, 12]
    assert sequence_bounds(torch.zeros(5).long(), torch.tensor([0, 5, 5], dtype=torch.int32)).tolist() == [0, 5, 5]
