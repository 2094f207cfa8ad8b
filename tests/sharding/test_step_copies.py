"""What a save has copied is found by its memory, as long as it has not changed, and is lent until it is given back."""

from __future__ import annotations

import torch

from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.staged_copy import StagedCopy
from shardsmith.sharding.step_copies import StepCopies


def test_a_copy_is_found_by_memory_and_version() -> None:
    weight, buffer, turned = torch.randn(6, 5), torch.zeros(3), torch.randn(4, 4).t()
    live, memory, found = [weight, buffer, turned], StagingBuffer(), StepCopies()
    StagedCopy(live, [tensor.dtype for tensor in live], memory).begin(None, found)
    buffer += 1
    others = [weight[2:4], weight.detach().view(-1)[7:9], weight.view(torch.int32), weight[:, 1:], weight.clone()]
    whole, rows, run, *nothing = found.borrow([weight, *others, buffer, turned, torch.empty(0)]).copies
    assert whole is not None
    assert rows is not None
    assert run is not None
    assert torch.equal(whole, weight)
    assert torch.equal(rows, weight[2:4])
    assert torch.equal(run, weight.view(-1)[7:9])
    assert whole.data_ptr() == memory._memory.data_ptr()
    assert nothing == [None] * 6


def test_a_buffer_is_lent_until_the_last_one_gives_it_back() -> None:
    live, memory, found = [torch.ones(3)], StagingBuffer(), StepCopies()
    StagedCopy(live, [torch.float32], memory).begin(None, found)
    one, other, none = found.borrow(live), found.borrow(live), found.borrow([torch.ones(3)])
    found.clear()
    assert found.borrow(live).copies == [None]
    for borrowed, readers in ((none, 2), (one, 1), (one, 1), (other, 0)):
        borrowed.give_back()
        assert memory._readers == readers
    memory.places(live, [torch.float32])
