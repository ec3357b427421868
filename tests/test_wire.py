"""Tensors that travel in fewer bits than they have: the same values on every carrier, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from carriers import CARRIERS, CHUNK, Pair, pair_over, pass_on
from peers import PATIENCE_S
from wire_bytes import same_bits

from tsqp._message import WIRE_ENCODINGS
from tsqp.errors import EncodingError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Around a row, a block of 64 bytes, the step of a slot that fills, a slot, and far above it.
SHAPES = [(), (1,), (0,), (3, 0), (7,), (3, 5), (2, 3, 33), (64, 64), (17, 1024), (3, CHUNK // 4), (9, CHUNK // 2)]


@pytest.fixture(params=CARRIERS)
def pair(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Pair]:
    with pair_over(CARRIERS[request.param], endpoint) as both:
        yield both


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))
    return (tensor * 10).to(dtype)


def int8_rows(tensor: torch.Tensor) -> torch.Tensor:
    """What int8 makes of finite rows, computed by torch from the rule in the documentation."""
    rows = tensor.float().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    scale = rows.abs().amax(dim=-1, keepdim=True) / torch.tensor(127.0)
    steps = torch.where(scale > 0, torch.round(rows / scale), torch.zeros_like(rows))
    return (steps * scale).to(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_arrives_as_float32_rounded_to_nearest_even(pair: Pair, shape: tuple[int, ...]) -> None:
    tensor = sample(shape)
    message = pass_on(pair.client, pair.server, [tensor], wire="bfloat16")
    assert same_bits(message.tensors[0], tensor.to(torch.bfloat16).float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_int8_arrives_in_its_own_dtype_within_half_a_step(
    pair: Pair, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = sample(shape, dtype)
    received = pass_on(pair.server, pair.client, [tensor], wire="int8").tensors[0]
    assert received.dtype is dtype
    assert torch.equal(received, int8_rows(tensor))


def test_fewer_bytes_travel(pair: Pair) -> None:
    tensor = torch.randn(64, 512)
    plain, half, quarter = (
        pass_on(pair.client, pair.server, [tensor], wire=wire).nbytes for wire in (None, "bfloat16", "int8")
    )
    assert plain - half == tensor.nbytes // 2
    assert plain - quarter == tensor.nbytes - tensor.numel() - 64 * 4


def test_one_name_is_for_every_tensor_that_can_travel_so(pair: Pair) -> None:
    tensors = [sample((5, 7)), torch.arange(9), sample((4,), torch.bfloat16), torch.tensor(True)]
    received = pass_on(pair.client, pair.server, tensors, wire="bfloat16").tensors
    assert same_bits(received[0], tensors[0].to(torch.bfloat16).float())
    assert all(same_bits(a, b) for a, b in zip(received[1:], tensors[1:], strict=True))


def test_one_name_for_each_tensor(pair: Pair) -> None:
    tensors = [sample((5, 7)), sample((5, 7)), sample((5, 7))]
    received = pass_on(pair.client, pair.server, tensors, wire=["int8", None, "bfloat16"], meta={"a": 1})
    assert torch.equal(received.tensors[0], int8_rows(tensors[0]))
    assert same_bits(received.tensors[1], tensors[1])
    assert same_bits(received.tensors[2], tensors[2].to(torch.bfloat16).float())
    assert received.meta == {"a": 1}


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [33, 3 * CHUNK // 256])
def test_strided_tensors_travel_like_their_copies(pair: Pair, wire: str, rows: int) -> None:
    tensor = sample((64, 2 * rows))[:, ::2].t()
    assert not tensor.is_contiguous()
    received = pass_on(pair.client, pair.server, [tensor], wire=wire).tensors[0]
    expected = pass_on(pair.client, pair.server, [tensor.contiguous()], wire=wire).tensors[0]
    assert same_bits(received, expected)


def test_a_lease_holds_the_decoded_tensor(pair: Pair) -> None:
    tensors = [sample((8, 16)), sample((8, 16))]
    pair.client.send(tensors, wire=["int8", None], timeout=PATIENCE_S)
    with pair.server.lease(PATIENCE_S) as message:
        assert torch.equal(message.tensors[0], int8_rows(tensors[0]))
        assert same_bits(message.tensors[1], tensors[1])
        kept = message.tensors[0]
    pair.client.send([torch.zeros(8, 16)], timeout=PATIENCE_S)
    pair.server.recv(PATIENCE_S)
    assert torch.equal(kept, int8_rows(tensors[0]))  # private memory: the slot's next message is not seen in it


def test_special_values(pair: Pair) -> None:
    inf, nan = float("inf"), float("nan")
    tensor = torch.tensor([[1.0, nan, -2.0], [inf, 0.5, -inf], [0.0, -0.0, 0.0], [3.4e38, -3.4e38, 1e-40]])
    half, rows = (pass_on(pair.client, pair.server, [tensor], wire=w).tensors[0] for w in ("bfloat16", "int8"))
    torch.testing.assert_close(half, tensor.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    assert rows[:2].isnan().all()  # the loss is seen, in the whole row
    assert (rows[2] == 0).all()
    torch.testing.assert_close(rows[3], tensor[3], rtol=0, atol=3.4e38 / 253)


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        ("float16", "none of"),
        (7, "none of"),
        (["int8"], "1 encodings for 2 tensors"),
        (["bfloat16", "bfloat16"], "tensor 1 is torch.int64"),
        ([None, ["int8"]], "none of"),
    ],
)
def test_what_can_not_be_is_refused_and_nothing_is_sent(pair: Pair, wire: object, says: str) -> None:
    tensors = [torch.ones(3), torch.arange(3)]
    with pytest.raises(EncodingError, match=says):
        pair.client.send(tensors, wire=wire, timeout=PATIENCE_S)  # type: ignore[arg-type]
    received = pass_on(pair.client, pair.server, tensors, request_id=3)
    assert received.request_id == 3
    assert same_bits(received.tensors[0], tensors[0])


def test_every_encoding_is_tested_here() -> None:
    assert set(WIRE_ENCODINGS) == {None, "bfloat16", "int8"}
