"""ShmRingBuffer: bytes through slots, waits and deadlines, closed and dead peers, buffers and leases."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random

import numpy as np
import peers
import pytest
from peers import PATIENCE_S, Peer

from tsqp import RingHandle, ShmRingBuffer
from tsqp.errors import (
    ClosedError,
    ConfigError,
    MessageTooLargeError,
    PeerDiedError,
    RingCorruptedError,
    RingUsageError,
    WaitTimeoutError,
)

CHUNK, COUNT = 4096, 4
WAITS = ["auto", "spin", "block", "poll"]
StartPeer = Callable[..., Peer]


@contextmanager
def ring_pair(chunk: int = CHUNK, count: int = COUNT, **options) -> Iterator[tuple[ShmRingBuffer, ShmRingBuffer]]:
    """The creator, which writes, and the attached end, which reads."""
    with ShmRingBuffer(chunk, count, **options) as writer, ShmRingBuffer(*writer.handle(), **options) as reader:
        yield writer, reader


@pytest.fixture
def pair() -> Iterator[tuple[ShmRingBuffer, ShmRingBuffer]]:
    with ring_pair() as both:
        yield both


def put(ring: ShmRingBuffer, data: bytes, timeout: float | None = PATIENCE_S) -> None:
    with ring.acquire_write(timeout, len(data)) as view:
        view[:] = data


def get(ring: ShmRingBuffer, timeout: float | None = PATIENCE_S) -> bytes:
    with ring.acquire_read(timeout) as view:
        return bytes(view)


def start_ring_end(start_peer: StartPeer, *arguments) -> Peer:
    peer = start_peer(peers.ring_end, *arguments)
    assert peer.hear() == "made"
    return peer


# --- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("ahead", [1, 2, 10])
def test_messages_arrive_whole_and_in_order_around_every_slot(count, ahead):
    random = Random(count)
    with ring_pair(CHUNK, count) as (writer, reader):
        sent: list[bytes] = []
        for number in range(5 * count + 3):
            data = bytes([number]) * random.choice([0, 1, 63, 64, 65, CHUNK - 1, CHUNK])
            put(writer, data)
            sent.append(data)
            if len(sent) == min(ahead, count):
                assert get(reader) == sent.pop(0)
        assert [get(reader) for _ in sent] == sent


def test_without_a_length_the_whole_slot_is_published(pair):
    writer, reader = pair
    with writer.acquire_write() as view:
        assert len(view) == CHUNK
        view[:] = bytes(range(256)) * (CHUNK // 256)
    assert get(reader) == bytes(range(256)) * (CHUNK // 256)


@pytest.mark.parametrize("nbytes", [CHUNK + 1, 1 << 62, -1])
def test_a_length_over_the_slot_is_refused_and_the_ring_goes_on(pair, nbytes):
    writer, reader = pair
    with pytest.raises(MessageTooLargeError, match=f"{nbytes} bytes do not fit a slot of {CHUNK}"):
        writer.acquire_write(0, nbytes).__enter__()
    put(writer, b"next")
    assert get(reader) == b"next"


def test_readers_get_read_only_memory(pair):
    writer, reader = pair
    put(writer, b"x")
    with reader.acquire_read(0) as view, pytest.raises(TypeError):
        view[0] = 1


def test_no_read_is_torn_between_two_processes(start_peer):
    count = 20_000
    random = Random(7)
    with ShmRingBuffer(1024, 3) as ring:
        peer = start_peer(peers.stream_to_ring, ring.handle(), 7, count)
        for number in range(count):
            expected = bytes([number % 251]) * random.randrange(8, 1024)
            assert get(ring) == expected
        with pytest.raises(ClosedError):
            get(ring)
        assert peer.join() == 0


def test_handle_tells_what_another_process_needs(pair):
    writer, _ = pair
    handle = writer.handle()
    assert isinstance(handle, RingHandle)
    assert handle[:3] == (CHUNK, COUNT, writer.name)
    assert len(handle.session) == 16
    assert any(handle.session)
    assert (writer.max_chunk_bytes, writer.max_chunks) == (CHUNK, COUNT)
    assert writer.is_creator
    assert not pair[1].is_creator


# --- waits and deadlines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("timeout", [0, 0.05, 0.15])
def test_a_deadline_ends_both_waits_and_loses_nothing(wait, timeout):
    with ring_pair(wait=wait) as (writer, reader):
        for _ in range(2):
            with pytest.raises(WaitTimeoutError, match="no message"):
                get(reader, timeout)
            for number in range(COUNT):
                put(writer, bytes([number]), 0)
            with pytest.raises(TimeoutError, match="no free slot"):
                put(writer, b"one too many", timeout)
            assert [get(reader, timeout) for _ in range(COUNT)] == [bytes([n]) for n in range(COUNT)]


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan")])
def test_a_senseless_timeout_is_refused(pair, timeout):
    for acquire in (pair[0].acquire_write, pair[1].acquire_read):
        with pytest.raises(ConfigError, match="timeout"):
            acquire(timeout).__enter__()


def test_an_unknown_wait_mode_is_refused():
    with pytest.raises(ConfigError, match="wait='sleep' is none of auto, spin, block, poll"):
        ShmRingBuffer(wait="sleep")


@pytest.mark.parametrize("wait", WAITS)
def test_a_waiting_thread_lets_the_other_one_run(wait):
    """Both ends in one process: neither would get on if the other waited with the GIL."""
    with ring_pair(count=2, wait=wait) as (writer, reader):
        received: list[bytes] = []
        thread = threading.Thread(target=lambda: received.extend(get(reader) for _ in range(40)))
        thread.start()
        for number in range(40):
            if number % 8 == 0:
                time.sleep(0.02)  # now the reader waits, else the writer
            put(writer, bytes([number]))
        thread.join()
        assert received == [bytes([number]) for number in range(40)]


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("role", ["reader", "writer"])
def test_ctrl_c_ends_a_wait_without_deadline(start_peer, role, wait):
    with ShmRingBuffer(CHUNK, 2) as ring:
        peer = start_peer(peers.wait_for_ever, ring.handle(), role, wait)
        assert peer.hear() == "waiting"
        time.sleep(0.2)
        peer.interrupt()
        assert peer.hear() == "interrupted"
        if role == "reader":
            put(ring, b"after all")
        else:
            get(ring)
        assert peer.hear() == "acquired"


# --- a peer that closes ---------------------------------------------------------------------------------------


def test_what_was_published_before_close_is_delivered_then_closed_error(pair):
    writer, reader = pair
    for number in range(3):
        put(writer, bytes([number]))
    writer.close()
    assert [get(reader, 0) for _ in range(3)] == [b"\0", b"\1", b"\2"]
    for _ in range(2):
        with pytest.raises(ClosedError, match=r"the peer of segment tsqp-\w+ closed it"):
            get(reader, None)


def test_writing_to_a_closed_reader_is_an_error(pair):
    writer, reader = pair
    put(writer, b"never read")
    reader.close()
    with pytest.raises(ConnectionError, match="closed"):
        put(writer, b"x", None)


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("closing", ["the peer", "this end"])
@pytest.mark.parametrize("role", ["reader", "writer"])
def test_close_ends_a_wait_in_progress(wait, closing, role):
    with ring_pair(count=1, wait=wait) as (writer, reader):
        put(writer, b"full")
        if role == "reader":
            get(reader)
        waiting, other = (reader, writer) if role == "reader" else (writer, reader)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                get(waiting, None) if role == "reader" else put(waiting, b"", None)
            except ClosedError as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1)
        (other if closing == "the peer" else waiting).close()
        thread.join()
        assert len(errors) == 1


def test_a_ring_closed_here_says_so_and_closing_twice_is_harmless(pair):
    writer, reader = pair
    for ring in pair:
        ring.close()
        ring.close()
        assert ring.closed
    for acquire in (writer.acquire_write, reader.acquire_read):
        with pytest.raises(ClosedError, match="this ring is closed"):
            acquire(0)


def test_a_ring_that_is_just_dropped_says_goodbye(shm_directory):
    writer = ShmRingBuffer(CHUNK, COUNT)
    name = writer.name
    assert (shm_directory / name).exists()
    with ShmRingBuffer(*writer.handle()) as reader:
        put(writer, b"last words")
        del writer
        assert get(reader) == b"last words"
        with pytest.raises(ClosedError):
            get(reader, None)
    assert not (shm_directory / name).exists()


def test_close_with_an_open_block_is_orderly(pair):
    writer, reader = pair
    with writer.acquire_write(0, 4) as view:
        writer.close()
        view[:] = b"late"
    assert get(reader) == b"late"
    with pytest.raises(ClosedError):
        get(reader)


# --- a peer that dies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("creator", ["parent", "peer"])
@pytest.mark.parametrize("death", ["SIGKILL", "exit"])
def test_messages_of_a_dead_writer_are_delivered_then_its_death_is_told(start_peer, shm_directory, creator, death):
    with ExitStack() as stack:
        if creator == "parent":
            ring = stack.enter_context(ShmRingBuffer(CHUNK, COUNT))
            peer = start_ring_end(start_peer, ring.handle())
        else:
            peer = start_ring_end(start_peer)
            ring = stack.enter_context(ShmRingBuffer(*peer.ask("handle")))
        peer.ask("write", b"one", b"two")
        peer.ask("open_write", b"unfinished")
        if death == "SIGKILL":
            peer.kill()
        else:
            peer.say(("leave",))
            assert peer.join() == 3
        assert get(ring) == b"one"
        assert get(ring, 0) == b"two"
        end = "attached" if creator == "parent" else "creating"
        for timeout in (None, 0, PATIENCE_S):
            with pytest.raises(PeerDiedError, match=f"the {end} end of {ring.name} died: the kernel released"):
                get(ring, timeout)
        (shm_directory / ring.name).unlink(missing_ok=True)  # a killed creator can't


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("role", ["reader", "writer"])
def test_death_of_the_peer_ends_a_wait_in_progress(start_peer, role, wait):
    with ShmRingBuffer(CHUNK, 1, wait=wait) as ring:
        peer = start_ring_end(start_peer, ring.handle())
        if role == "writer":
            put(ring, b"fills the only slot")
        killer = threading.Timer(0.3, peer.kill)
        killer.start()
        with pytest.raises(PeerDiedError, match="died"):
            get(ring, None) if role == "reader" else put(ring, b"", None)
        killer.join()


def test_a_reader_that_died_takes_no_more(start_peer):
    """Free slots are still written to: the writer learns of it when it has to wait."""
    with ShmRingBuffer(CHUNK, 2) as ring:
        peer = start_ring_end(start_peer, ring.handle())
        put(ring, b"read")
        assert peer.ask("read") == b"read"
        peer.kill()
        put(ring, b"never read", 0)
        put(ring, b"never read", 0)
        with pytest.raises(PeerDiedError):
            put(ring, b"no room", None)


def test_a_peer_that_is_only_stopped_is_not_dead(start_peer):
    with ShmRingBuffer(CHUNK, COUNT) as ring:
        peer = start_ring_end(start_peer, ring.handle())
        peer.stop()
        with pytest.raises(WaitTimeoutError):
            get(ring, 0.5)
        peer.go_on()
        peer.ask("write", b"here I am")
        assert get(ring) == b"here I am"


# --- blocks, buffers and leases -------------------------------------------------------------------------------


def test_an_exception_in_a_write_block_publishes_nothing(pair):
    writer, reader = pair
    for number in range(3 * COUNT):
        with pytest.raises(ZeroDivisionError), writer.acquire_write() as view:
            view[number // 0] = 1
        with pytest.raises(WaitTimeoutError):
            get(reader, 0)
        put(writer, bytes([number]))
        assert get(reader) == bytes([number])


def test_an_exception_in_a_read_block_frees_the_slot(pair):
    writer, reader = pair
    for number in range(3 * COUNT):
        put(writer, bytes([number]), 0)
        with pytest.raises(ZeroDivisionError), reader.acquire_read(0) as view:
            view[number // 0]


def test_the_view_is_dead_after_its_block(pair):
    writer, reader = pair
    with writer.acquire_write(0, 8) as view:
        pass
    with pytest.raises(ValueError, match="released"):
        view[0] = 1
    with reader.acquire_read(0) as view:
        pass
    with pytest.raises(ValueError, match="released"):
        bytes(view)


def test_an_array_kept_past_its_block_never_reaches_unmapped_memory():
    writer = ShmRingBuffer(CHUNK, COUNT)
    reader = ShmRingBuffer(*writer.handle())
    with writer.acquire_write(0) as view:
        written = np.frombuffer(view, np.uint8)
        written[:] = 7
    with reader.acquire_read(0) as view:
        read = np.frombuffer(view, np.uint8)
    writer.close()
    reader.close()
    del writer, reader, view
    written[:] = 9
    assert read.sum() == 9 * CHUNK


def test_slots_may_be_released_in_any_order():
    random = Random(3)
    with ring_pair(count=5) as (writer, reader):
        number, open_reads, expected = 0, [], 0
        for _ in range(2000):
            if open_reads and random.random() < 0.5:
                data, acquired, view = open_reads.pop(random.randrange(len(open_reads)))
                assert bytes(view) == data  # nobody wrote over it meanwhile
                acquired.__exit__(None, None, None)
            try:
                put(writer, number.to_bytes(4, "little") * 16, 0)
                number += 1
            except WaitTimeoutError:
                pass
            if expected < number and len(open_reads) < 5:
                acquired = reader.acquire_read(0)
                open_reads.append((expected.to_bytes(4, "little") * 16, acquired, acquired.__enter__()))
                expected += 1
        for _, acquired, _ in open_reads:
            acquired.__exit__(None, None, None)
        assert number > 500


def test_reading_with_every_slot_leased_is_an_error_not_a_hang(pair):
    writer, reader = pair
    with ExitStack() as leases:
        for number in range(COUNT):
            put(writer, bytes([number]))
            leases.enter_context(reader.acquire_read(0))
        with pytest.raises(RingUsageError, match="at most max_chunks leases"):
            get(reader, None)
    put(writer, b"next")
    assert get(reader) == b"next"


def test_one_write_may_be_open_at_a_time(pair):
    writer, reader = pair
    with writer.acquire_write(0, 5) as view:
        with pytest.raises(RingUsageError, match="one open write at a time"):
            put(writer, b"second", None)
        view[:] = b"first"
    put(writer, b"second")
    assert [get(reader), get(reader)] == [b"first", b"second"]


def test_an_acquire_is_used_once_at_a_time(pair):
    acquired = pair[0].acquire_write(0)
    with acquired, pytest.raises(RingUsageError, match="already open"):
        acquired.__enter__()
    with acquired:
        pass
    assert len(get(pair[1])) == CHUNK


def test_two_writers_on_one_ring_are_noticed(pair):
    put(pair[0], b"first")
    with pytest.raises(RingCorruptedError):
        put(pair[1], b"second", 0)


def test_options_are_keyword_only_and_geometry_must_be_whole():
    with pytest.raises(TypeError):
        ShmRingBuffer(CHUNK, COUNT, None, None, True)
    with pytest.raises(ConfigError, match="create=False needs the name"):
        ShmRingBuffer(CHUNK, COUNT, create=False)


def test_a_view_that_its_user_released_is_published_whole():
    with ShmRingBuffer(4096, 2) as writer, ShmRingBuffer(*writer.handle()) as reader:
        for data in (b"hello", b"again"):
            with writer.acquire_write(PATIENCE_S, 5) as view, view:
                view[:] = data
            with reader.acquire_read(PATIENCE_S) as view, view:
                assert bytes(view) == data


def test_what_comes_with_a_signal_is_not_lost():
    """The handler's exception comes out of the wait before anything is taken."""

    class StopError(Exception):
        pass

    def stop(*_):
        raise StopError

    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.get_ident()
    try:
        with ShmRingBuffer(4096, 2, wait="spin") as reader, ShmRingBuffer(*reader.handle()) as writer:

            def interrupt_and_write():
                time.sleep(0.05)
                signal.pthread_kill(main, signal.SIGUSR1)
                with writer.acquire_write(PATIENCE_S, 5) as view:
                    view[:] = b"hello"

            thread = threading.Thread(target=interrupt_and_write)
            with pytest.raises(StopError):  # noqa: PT012 (it may come as soon as the thread runs)
                thread.start()
                reader.acquire_read(PATIENCE_S).__enter__()
            thread.join()
            with reader.acquire_read(PATIENCE_S) as view:
                assert bytes(view) == b"hello"
    finally:
        signal.signal(signal.SIGUSR1, before)
