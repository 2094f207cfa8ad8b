"""What a save has copied is found by its memory while it is unchanged, and moved out when the buffer is used again."""

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
    wanted = [weight, *others, buffer, turned, torch.empty(0)]
    whole, rows, run, *nothing = found.borrow(wanted, [tensor.dtype for tensor in wanted]).copies
    assert whole is not None
    assert rows is not None
    assert run is not None
    assert torch.equal(whole, weight)
    assert torch.equal(rows, weight[2:4])
    assert torch.equal(run, weight.view(-1)[7:9])
    assert whole.data_ptr() == memory._memory.data_ptr()
    assert nothing == [None] * 6


def test_a_copy_is_moved_out_of_a_buffer_that_is_used_again() -> None:
    live, memory, found = [torch.ones(3), torch.full((2,), 2.0)], StagingBuffer(), StepCopies()
    same, dtypes = [torch.float32] * 2, [torch.bfloat16, torch.float32]
    StagedCopy(live, same, memory).begin(None, found)
    one, other, none = found.borrow(live, dtypes), found.borrow(live, same), found.borrow([torch.ones(3)], same[:1])
    found.clear()
    assert found.borrow(live, same).copies == [None, None]
    none.give_back()
    other.give_back()
    other.give_back()
    assert len(memory._readers) == 1
    held = one.read(1)
    StagedCopy([tensor + 5 for tensor in live], same, memory).begin()
    assert not memory._readers
    assert torch.equal(held, live[1])
    assert torch.equal(one.read(0), live[0].bfloat16())
    assert torch.equal(one.read(1), live[1])
    one.give_back()
