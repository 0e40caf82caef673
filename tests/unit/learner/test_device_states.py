"""States that stay on a device: found with the very tensors they were made of, bounded, and freed with them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perennial.learner.together.device_states import HotStates, PinnedRows, stacked_rows
from perennial.learner.together.stacked_lora import Layout

ROW_BYTES = 4 * 6


def tensors_of(value: float) -> list[torch.Tensor]:
    """Return two tensors that are views of one memory, as those of an adapter are."""
    memory = torch.full((6,), value)
    return [memory[:4].view(2, 2), memory[4:]]


def row_of(value: float) -> torch.Tensor:
    return torch.full((6,), value)


def test_a_copy_is_found_with_its_own_tensors_alone() -> None:
    hot, tensors = HotStates(10 * ROW_BYTES), tensors_of(1.0)
    hot.put(tensors, row_of(1.0))
    found = hot.get(tensors)
    assert found is not None
    assert torch.equal(found, row_of(1.0))
    assert hot.get(tensors_of(1.0)) is None, "equal numbers are not the same tensors"
    assert hot.get([tensors[0], torch.full((2,), 9.0)]) is None
    assert hot.get(tensors[:1]) is None


def test_a_copy_of_changed_tensors_is_not_found() -> None:
    hot, tensors = HotStates(10 * ROW_BYTES), tensors_of(1.0)
    hot.put(tensors, row_of(1.0))
    tensors[1].add_(1)
    assert hot.get(tensors) is None


def test_copies_stay_within_the_budget_and_the_oldest_goes_first() -> None:
    hot = HotStates(2 * ROW_BYTES)
    first, second, third = (tensors_of(value) for value in (1.0, 2.0, 3.0))
    hot.put(first, row_of(1.0))
    hot.put(second, row_of(2.0))
    assert hot.get(first) is not None  # used last
    hot.put(third, row_of(3.0))
    assert hot.size_bytes == 2 * ROW_BYTES
    assert [hot.get(tensors) is not None for tensors in (first, second, third)] == [True, False, True]


def test_a_copy_that_is_larger_than_the_budget_is_not_kept() -> None:
    hot, tensors = HotStates(ROW_BYTES - 1), tensors_of(1.0)
    hot.put(tensors, row_of(1.0))
    assert hot.get(tensors) is None
    assert hot.size_bytes == 0


@pytest.mark.parametrize("evicted", [False, True])
def test_a_copy_is_freed_with_its_tensors(evicted: bool) -> None:
    hot, tensors, other = HotStates(ROW_BYTES if evicted else 2 * ROW_BYTES), tensors_of(1.0), tensors_of(2.0)
    hot.put(tensors, row_of(1.0))
    hot.put(other, row_of(2.0))
    del tensors
    gc.collect()
    assert hot.size_bytes == ROW_BYTES
    assert hot.get(other) is not None
    del other
    gc.collect()
    assert hot.size_bytes == 0


def test_memory_of_a_row_is_used_again_once_no_view_of_it_lives() -> None:
    rows = PinnedRows(2 * ROW_BYTES)
    first = rows.row(6, pin=False)
    place, view = first.data_ptr(), first.view(2, 3)[1]
    del first
    gc.collect()
    second = rows.row(6, pin=False)
    assert second.data_ptr() != place, "a view of the first row lives"
    del view
    gc.collect()
    assert rows.row(6, pin=False).data_ptr() == place
    assert rows.size_bytes == 2 * ROW_BYTES


def test_rows_beyond_the_budget_are_in_ordinary_memory() -> None:
    rows = PinnedRows(ROW_BYTES)
    held = [rows.row(6, pin=False) for _ in range(3)]
    assert rows.size_bytes == ROW_BYTES
    assert len({row.data_ptr() for row in held}) == 3


def test_rows_are_taken_from_where_the_tensors_are() -> None:
    """The device of a base is `cuda`, that of a tensor there `cuda:0`; nothing may be copied through the host."""
    device, layout = torch.device("cuda"), Layout(("a", "b"), ((2, 2), (2, 3)), (0, 4), 10)
    with FakeTensorMode():
        state = layout.views(torch.empty(10, device=device))
        rows = stacked_rows(layout, [state, None], "", device, HotStates(0))
    assert (rows.device.type, tuple(rows.shape)) == ("cuda", (2, 10))
