"""Messages computed in place: what is written into reserved tensors is what arrives, or nothing is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from carriers import CARRIERS, CHUNK, COUNT, Background, Pair, pair_over, pass_on
from patience import until
from peers import PATIENCE_S
from wire_bytes import DTYPES, check_numbered, numbered, same_bits, tensor_of

from tsqp.errors import (
    ClosedError,
    DTypeError,
    RankError,
    RingUsageError,
    ShapeError,
    TooManyTensorsError,
    WaitTimeoutError,
)


@pytest.fixture(params=CARRIERS)
def pair(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Pair]:
    with pair_over(CARRIERS[request.param], endpoint) as both:
        yield both


@pytest.fixture
def ring(endpoint: str) -> Iterator[Pair]:
    with pair_over(CARRIERS["ring"], endpoint) as both:
        yield both


@pytest.mark.parametrize("rows", [3, 700])  # in a slot, and too large for one
def test_matmul_writes_the_message(pair: Pair, rows: int) -> None:
    a, b = torch.randn(rows, 8), torch.randn(8, 64)
    receiving = Background()
    received = []
    receiving.start(lambda: received.append(pair.server.recv(PATIENCE_S)))
    with pair.client.reserve([((rows, 64), torch.float32), a], tag=5, meta={"k": 1}, timeout=PATIENCE_S) as out:
        torch.matmul(a, b, out=out[0])
        out[1].copy_(a)
    receiving.join()
    assert (received[0].tag, received[0].meta) == (5, {"k": 1})
    assert same_bits(received[0].tensors[0], a @ b)
    assert same_bits(received[0].tensors[1], a)


@pytest.mark.parametrize("transfer", [False, True])
def test_the_block_ends_when_the_whole_message_is_on_its_way(endpoint: str, transfer: bool) -> None:
    """Whenever the peer begins to read, nothing more has to be called here; unless the rest was to follow later."""
    with pair_over(CARRIERS["ring-tiled"], endpoint) as pair:
        receiving = Background()
        received = []

        def receive() -> None:
            until(lambda: pair.server.poll() and pair.client._sender._tail is not None)
            time.sleep(0.1)  # far longer than what a sender waits that may go on later
            received.append(pair.server.recv(PATIENCE_S))

        receiving.start(receive)
        spec = ((10 * CHUNK,), torch.uint8)
        with pair.client.reserve([spec], timeout=PATIENCE_S, transfer=transfer) as out:
            out[0].fill_(7)
        assert pair.client.sending == transfer
        if transfer:
            until(lambda: pair.client.can_send() and not pair.client.sending)
        receiving.join()
        assert (received[0].tensors[0] == 7).all()


@pytest.mark.parametrize("nbytes", [100, 2 * CHUNK])
def test_what_was_given_away_before_is_written_first(endpoint: str, nbytes: int) -> None:
    """From its own plan, which the block makes anew."""
    with pair_over(CARRIERS["ring-tiled"], endpoint) as pair:
        pair.client.send([numbered(1, 8 * CHUNK)], request_id=1, transfer=True)
        assert pair.client.sending
        receiving = Background()

        def receive() -> None:
            check_numbered(pair.server.recv(PATIENCE_S), 1, 8 * CHUNK)
            check_numbered(pair.server.recv(PATIENCE_S), 2, nbytes)

        receiving.start(receive)
        with pair.client.reserve([numbered(2, nbytes)], request_id=2, timeout=PATIENCE_S) as out:
            out[0].copy_(numbered(2, nbytes))
        receiving.join()


def test_a_message_of_which_a_part_was_not_taken_in_time_is_given_up(endpoint: str) -> None:
    with pair_over(CARRIERS["ring-tiled"], endpoint) as pair:
        with pytest.raises(WaitTimeoutError), pair.client.reserve([((10 * CHUNK,), torch.uint8)], timeout=0.1):
            pass
        assert not pair.client.sending
        with pytest.raises(WaitTimeoutError):
            pair.server.recv(0.1)
        pass_on(pair.client, pair.server, [torch.ones(3)])


def test_tensors_lie_in_the_slot(ring: Pair) -> None:
    with ring.client.reserve([((16,), torch.float32)], timeout=PATIENCE_S) as out:
        address = out[0].data_ptr()
        out[0].fill_(7)
    with ring.server.lease(PATIENCE_S) as message:
        message.tensors[0].fill_(8)  # a lease is a view of the same memory through another mapping
    assert (out[0] == 8).all()
    assert out[0].data_ptr() == address


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_rank(ring: Pair, dtype: torch.dtype) -> None:
    tensors = [tensor_of(dtype, shape, 1) for shape in ((), (0,), (3,), (2, 0, 3), (2, 3, 4), (1,) * 8)]
    with ring.client.reserve(tensors, timeout=PATIENCE_S) as out:
        for reserved, tensor in zip(out, tensors, strict=True):
            reserved.copy_(tensor)
    received = ring.server.recv(PATIENCE_S).tensors
    assert all(same_bits(a, b) for a, b in zip(received, tensors, strict=True))


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("wrong", [(2, 8), (8, 4), (16, 16), (5,)])
def test_out_of_a_wrong_shape_is_refused(pair: Pair, wrong: tuple[int, ...]) -> None:
    with (
        pytest.raises((ShapeError, RuntimeError)),
        pair.client.reserve([((4, 8), torch.float32)], timeout=PATIENCE_S) as out,
    ):
        torch.add(torch.ones(wrong), 1, out=out[0])
    nothing_was_sent(pair)


def test_a_tensor_that_was_transposed_or_moved_is_refused(pair: Pair) -> None:
    with (
        pytest.raises(ShapeError, match=r"tensor 1 .*\[4, 4\].*Nothing was sent"),
        pair.client.reserve([((3,), torch.int64), ((4, 4), torch.float32)], timeout=PATIENCE_S) as out,
    ):
        out[1].t_()
    with (
        pytest.raises(ShapeError),
        pair.client.reserve([((4, 4), torch.float32)], timeout=PATIENCE_S) as out,
    ):
        out[0].data = torch.zeros(4, 4)
    nothing_was_sent(pair)


def nothing_was_sent(pair: Pair) -> None:
    pair.client.send([torch.tensor(3)], timeout=PATIENCE_S)
    assert int(pair.server.recv(PATIENCE_S).tensors[0]) == 3


def test_an_exception_sends_nothing_and_gives_the_slot_back(pair: Pair) -> None:
    for _ in range(2 * COUNT):
        with pytest.raises(ZeroDivisionError), pair.client.reserve([((4,), torch.float32)], timeout=PATIENCE_S):
            raise ZeroDivisionError
    nothing_was_sent(pair)


def test_a_send_inside_the_block_is_an_error_not_a_deadlock(pair: Pair) -> None:
    with pair.client.reserve([((4,), torch.float32)], timeout=PATIENCE_S) as out:
        out[0].zero_()
        with pytest.raises(RingUsageError, match="reserve"):
            pair.client.send([torch.ones(1)], timeout=PATIENCE_S)
        with (
            pytest.raises(RingUsageError, match="reserve"),
            pair.client.reserve([((4,), torch.float32)], timeout=PATIENCE_S),
        ):
            pass
    assert pair.server.recv(PATIENCE_S).tensors[0].tolist() == [0] * 4


def test_another_threads_send_waits_for_the_block(pair: Pair) -> None:
    inside = threading.Event()
    sending = Background()

    def send() -> None:
        inside.wait(PATIENCE_S)
        pair.client.send([torch.tensor(2)], timeout=PATIENCE_S)

    sending.start(send)
    with pair.client.reserve([((), torch.int64)], timeout=PATIENCE_S) as out:
        inside.set()
        out[0].fill_(1)
    sending.join()
    assert [int(pair.server.recv(PATIENCE_S).tensors[0]) for _ in range(2)] == [1, 2]


def test_no_free_slot_is_a_timeout(ring: Pair) -> None:
    for _ in range(COUNT):
        ring.client.send([torch.ones(1)], timeout=PATIENCE_S)
    with pytest.raises(WaitTimeoutError), ring.client.reserve([((4,), torch.float32)], timeout=0.05):
        pass
    for _ in range(COUNT):
        ring.server.recv(PATIENCE_S)
    nothing_was_sent(ring)


@pytest.mark.parametrize(
    ("specs", "error"),
    [
        ([((1,) * 9, torch.float32)], RankError),
        ([((4,), torch.complex64)], DTypeError),
        ([((4,), torch.float32)] * 65, TooManyTensorsError),
        ([((-1,), torch.float32)], ShapeError),
        ([((1 << 40, 1 << 40), torch.float32)], ShapeError),
    ],
)
def test_what_can_not_be_reserved(pair: Pair, specs: object, error: type[Exception]) -> None:
    with pytest.raises(error), pair.client.reserve(specs, timeout=PATIENCE_S):  # type: ignore[arg-type]
        pass
    nothing_was_sent(pair)


def test_closed(pair: Pair) -> None:
    reservation = pair.client.reserve([((CHUNK // 8,), torch.float32)], timeout=PATIENCE_S)
    with pytest.raises(ClosedError), reservation:
        pair.client.close()
    with pytest.raises(ClosedError), pair.client.reserve([((1,), torch.float32)]):
        pass
