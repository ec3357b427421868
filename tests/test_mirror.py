"""The mirror of K and V: what is sent makes the server hold what the cache has, and no more is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from tsqp import mirror
from tsqp.mirror import Change, Mirror


class FakeServer:
    """Applies changes as the server does and counts the positions that travelled."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None
        self.sent_positions = 0

    def apply(self, change: Change, key: Tensor, value: Tensor) -> None:
        parts = []
        for index, tensor in enumerate((key, value)):
            new = tensor[:, :, change.keep :]
            self.sent_positions += new.shape[2] if index == 0 else 0
            if change.keep:
                assert self.held is not None
                old = self.held[index]
                if change.only_appends:
                    assert change.batch_index is None
                    assert change.drop == 0
                    assert change.keep == old.shape[2]
                if change.batch_index is not None:
                    old = old[change.batch_index]
                old = old[:, :, change.drop :]
                assert change.keep <= old.shape[2]
                new = torch.cat([old[:, :, : change.keep], new], dim=2)
            parts.append(new.clone())
        self.held = (parts[0], parts[1])


class MirrorRun:
    """A mirror, a fake server, and a cache layer that is put through its paces."""

    def __init__(self, make_layer: Callable[[], Any], batch: int = 2) -> None:
        self.make_layer = make_layer
        self.layer = make_layer()
        self.batch = batch
        self.mirror, self.server = Mirror(), FakeServer()
        self.random = torch.Generator().manual_seed(0)

    def numbers(self, count: int) -> Tensor:
        # Few distinct values, so that rows and positions are often equal by chance.
        return torch.randint(0, 2, (self.batch, 1, count, 2), generator=self.random).float()

    def step(self, count: int) -> None:
        self.mirror.before_update(self.layer)
        key, value = self.layer.update(self.numbers(count), self.numbers(count))
        if isinstance(self.layer, StaticLayer):
            length = int(self.layer.get_seq_length())
            key, value = key[:, :, :length], value[:, :, :length]
        change = self.mirror.change_to(key, value, count)
        self.mirror.forget()
        self.server.apply(change, key, value)
        self.mirror.remember(key, value, self.layer)
        assert self.server.held is not None
        assert torch.equal(self.server.held[0], key)
        assert torch.equal(self.server.held[1], value)

    def disturb(self, how: str) -> None:
        if not self.layer.is_initialized:
            return
        if how == "reorder":
            self.layer.reorder_cache(torch.randint(0, self.batch, (self.batch,), generator=self.random))
        elif how == "crop" and isinstance(self.layer, DynamicLayer):
            rolls_back = not self.layer.is_sliding or self.layer.record_past
            if rolls_back and self.layer.get_seq_length() > 1:
                self.layer.crop(-1)
        elif how == "write":
            self.layer.keys[..., -1, :] += 1
        elif how == "replace keys":
            self.layer.keys = self.layer.keys + 1
        elif how == "replace values":
            self.layer.values = self.layer.values + 1
        elif how == "new cache":
            self.layer = self.make_layer()
        elif how == "fail":
            self.mirror.forget()


def recording_layer() -> DynamicSlidingWindowLayer:
    """A sliding layer that keeps what it would drop until the next crop, as assisted generation has it."""
    layer = DynamicSlidingWindowLayer(sliding_window=5)
    layer.activate_past_recording()
    return layer


class RewritingLayer(DynamicLayer):
    """Grows like its base, and changes what it held before, as caches that compress or quantise do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            self.keys = self.keys + 1
        return super().update(key_states, value_states, *args, **kwargs)


LAYER_KINDS: dict[str, Callable[[], Any]] = {
    "dynamic": DynamicLayer,
    "sliding": lambda: DynamicSlidingWindowLayer(sliding_window=5),
    "recording": recording_layer,
    "rewriting": RewritingLayer,
    "static": lambda: StaticLayer(max_cache_len=400),
}
ACTIONS = st.one_of(
    st.integers(1, 4),
    st.sampled_from(["reorder", "crop", "write", "replace keys", "replace values", "new cache", "fail"]),
)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("inference_mode", [False, True])
@given(actions=st.lists(ACTIONS, min_size=2, max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_mirror_always_gives_the_server_what_the_cache_has(
    kind: str, inference_mode: bool, actions: list[int | str]
) -> None:
    with torch.inference_mode(inference_mode):
        run = MirrorRun(LAYER_KINDS[kind])
        for action in actions:
            if isinstance(action, int):
                run.step(action)
            else:
                run.disturb(action)


@pytest.mark.parametrize(("kind", "expected"), [("dynamic", 30), ("sliding", 30), ("static", 40)])
def test_a_growing_cache_sends_each_position_once(kind: str, expected: int) -> None:
    run = MirrorRun(LAYER_KINDS[kind])
    run.step(10)
    for _ in range(20):
        run.step(1)
    # A static cache is found to be overwritten in place at its second call, which sends all 11 positions.
    assert run.server.sent_positions == expected


def test_a_reordered_cache_sends_only_new_positions() -> None:
    run = MirrorRun(DynamicLayer, batch=3)
    run.numbers = lambda count: torch.randn(3, 1, count, 2, generator=run.random)  # type: ignore[method-assign]
    run.step(10)
    for order in ([1, 1, 0], [2, 1, 0], [0, 0, 0]):
        run.layer.reorder_cache(torch.tensor(order))
        run.step(1)
    assert run.server.sent_positions == 13


def test_a_rolled_back_cache_sends_only_what_is_behind_the_common_prefix() -> None:
    run = MirrorRun(DynamicLayer)
    run.numbers = lambda count: torch.randn(2, 1, count, 2, generator=run.random)  # type: ignore[method-assign]
    run.step(10)
    run.layer.crop(-4)
    run.step(2)
    assert run.server.sent_positions == 12


def test_writing_in_place_again_and_again_is_seen() -> None:
    run = MirrorRun(DynamicLayer)
    for _ in range(4):
        run.step(2)
        run.layer.keys[..., 0, :] += 1
        run.step(1)
        run.layer.values[..., 0, :] += 1


def test_a_suffix_is_told_by_its_memory() -> None:
    whole = torch.zeros(1, 2, 6, 3)
    assert mirror._is_suffix(whole, whole)
    assert mirror._is_suffix(whole[:, :, 2:], whole)
    assert not mirror._is_suffix(whole[:, :, :4], whole)
    assert not mirror._is_suffix(torch.zeros(1, 2, 6, 3)[:, :, 2:], whole)
    assert not mirror._is_suffix(None, whole)


def test_a_mirror_copies_nothing_for_a_growing_cache() -> None:
    run = MirrorRun(DynamicLayer)
    run.step(4)
    assert run.mirror._key is not None
    assert run.mirror._key.tensor is run.layer.keys
