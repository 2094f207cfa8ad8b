"""Copies that another thread makes while the training goes on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from shardsmith.sharding import later_copy
from shardsmith.sharding.later_copy import LaterCopy


def test_the_training_waits_for_what_another_thread_is_still_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_go_on, copy_into = threading.Event(), threading.Event(), later_copy.copy_into

    def held_up(tensors: list[Tensor], copies: list[Tensor]) -> None:
        begun.set()
        assert may_go_on.wait(60)
        copy_into(tensors, copies)

    monkeypatch.setattr(later_copy, "copy_into", held_up)
    live, copies = [torch.ones(8)], [torch.zeros(8)]
    copy = LaterCopy(["weight"], live, live, copies)
    writing, training = threading.Thread(target=copy.copy), threading.Thread(target=copy.settle)
    writing.start()
    assert begun.wait(60)
    training.start()
    training.join(0.5)  # nothing is left for it to copy
    assert training.is_alive()
    may_go_on.set()
    for thread in (writing, training):
        thread.join(60)
    copy.result()
    assert torch.equal(copies[0], live[0])
