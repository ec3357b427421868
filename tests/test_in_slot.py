"""Replies computed in the slot they are sent from: what they hold, what becomes of a fault, what a client can do."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from rpc_support import HEAD_DIM, HEADS, KV_HEADS, PATIENCE_S, ask, client_of, endpoint_in, serving, tiny_model, until

import tsqp
from tsqp import answering, in_slot, server_ops
from tsqp.errors import RemoteError
from tsqp.protocol import Method, Status

#: What a wire's rounding may differ by, relative to the largest element.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def qkv(tokens: int, keys: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((HEADS, tokens), (KV_HEADS, keys or tokens), (KV_HEADS, keys or tokens))
    return tuple(torch.randn(1, heads, count, HEAD_DIM, generator=generator).to(dtype) for heads, count in sizes)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each reply that was computed in its slot."""
    seen: list[int] = []

    def counting(channel: Any, reply: in_slot.InSlot, *args: Any, **fields: Any) -> int:
        spent = in_slot.send_in_slot(channel, reply, *args, **fields)
        seen.append(sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in reply.specs))
        return spent

    monkeypatch.setattr(answering, "send_in_slot", counting)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
def test_scores_values_and_products_are_those_of_a_reply_that_is_copied(
    tmp_path, monkeypatch, counted: list[int], dtype: torch.dtype, wire: str
) -> None:
    q, k, v = qkv(100, dtype=dtype)
    probs = torch.rand(1, HEADS, 300, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    a, b = torch.randn(3, 70, 40).to(dtype), torch.randn(40, 150).to(dtype)
    found = {}
    for limit in (1 << 14, 1 << 40):
        monkeypatch.setattr(server_ops, "_IN_SLOT_FROM_BYTES", limit)
        with serving(tiny_model(dtype), tmp_path) as server, client_of(server, wire_dtype=wire) as client:
            scores = client.attention_scores(0, q, k, v)
            found[limit] = (scores, client.attention_values(0, probs), client.matmul(a, b))
        assert len(counted) == 3  # all of the first run, none of the second
    for direct, copied in zip(found[1 << 14], found[1 << 40], strict=True):
        assert direct.dtype is dtype
        assert torch.equal(direct, copied)
    expected = torch.matmul(a.float(), b.float())
    assert (found[1 << 14][2].float() - expected).abs().max() <= 2 * max(
        TOLERANCE[dtype], TOLERANCE[getattr(torch, wire)]
    ) * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"shm": False}, {"large": "zmq"}], ids=str)
def test_a_reply_larger_than_a_slot_or_without_one_comes_too(tmp_path, counted: list[int], options) -> None:
    q, k, v = qkv(200)  # 640 KB of scores, a slot is 256 KB
    with serving(tiny_model(), tmp_path) as server, client_of(server, **options) as client:
        scores = client.attention_scores(0, q, k, v)
    assert counted == [scores.nbytes]
    expected = q @ k.repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3)
    assert torch.allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("gemm"), Status.INTERNAL),
        (MemoryError(), Status.OUT_OF_MEMORY),
        (RemoteError("no", Status.LIMIT), Status.LIMIT),
    ],
    ids=["fault", "memory", "refusal"],
)
def test_a_fault_while_computing_changes_nothing_and_the_next_request_is_served(
    tmp_path, monkeypatch, error: Exception, status: Status
) -> None:
    q, k, v = qkv(100)
    bmm, faults = torch.bmm, [error]

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if faults and "out" in kwargs:
            kwargs["out"].fill_(7)  # a part of it was written already
            raise faults.pop()
        return bmm(*args, **kwargs)

    monkeypatch.setattr(torch, "bmm", failing)
    with serving(tiny_model(), tmp_path, max_chunks=2) as server, client_of(server) as client:
        with pytest.raises(RemoteError) as refused:
            client.attention_scores(0, q, k, v)
        assert refused.value.code == status
        assert not faults
        assert client.server_stats()["kv_bytes"] == 0  # nothing was taken over
        for _ in range(5):  # more than there are slots
            scores = client.attention_scores(0, q, k, v, keep=0)
        assert scores.shape == (1, HEADS, 100, 100)
        assert server.stats["errors"] == 1
        until(lambda: server.stats["calls"]["AttentionScores"] == 5)  # counted after the reply was sent


def test_a_client_that_scribbles_on_its_replies_decides_numbers_only(tmp_path) -> None:
    """It maps the slots the server computes in, and writes there all the time."""
    q, k, v = qkv(120)
    with serving(tiny_model(), tmp_path, max_chunks=2) as server:
        channel = tsqp.connect(endpoint_in(tmp_path), timeout=PATIENCE_S)
        with channel, client_of(server) as other:
            ask(channel, Method.ATTENTION_SCORES, (q, k, v), {"layer": 0})
            views = []
            for _ in range(2):
                channel.send((q, k, v), tag=Method.ATTENTION_SCORES, meta={"layer": 0, "keep": 0}, timeout=PATIENCE_S)
                lease = channel.lease(timeout=PATIENCE_S)
                views.append(lease.message.tensors[0])  # kept: the mapping stays
                lease.release()
            stop = threading.Event()

            def scribble() -> None:
                while not stop.is_set():
                    for view in views:
                        view.fill_(float("nan"))

            scribbler = threading.Thread(target=scribble)
            scribbler.start()
            try:
                for _ in range(50):
                    reply = ask(channel, Method.ATTENTION_SCORES, (q, k, v), {"layer": 0, "keep": 0})
                    assert (reply.status, reply.tensors[0].shape) == (0, (1, HEADS, 120, 120))
            finally:
                stop.set()
                scribbler.join()
            expected = q @ k.repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3)
            assert torch.allclose(other.attention_scores(0, q, k, v), expected, atol=1e-4)
            assert other.server_stats()["errors"] == 0
