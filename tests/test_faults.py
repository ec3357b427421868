"""A hostile peer: wrong bytes in flag words, in headers, in descriptors. Errors only, and the rest still arrives."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import mutations
import pytest
from peers import PATIENCE_S
from test_ring import CHUNK, COUNT, get, put, ring_pair
from wire_bytes import DESC, HEADER, Raw, Reader, raw, reader, with_desc

from tsqp import ShmRingBuffer, _ring
from tsqp._message import FLAG_TILED, FLAG_VIA_ZMQ
from tsqp.errors import (
    ClosedError,
    DTypeError,
    EncodingError,
    MagicError,
    MetaError,
    OffsetError,
    PeerDiedError,
    RankError,
    RingCorruptedError,
    ShapeError,
    SizeMismatchError,
    TooManyTensorsError,
    TruncatedMessageError,
    TsqpError,
    VersionError,
    WaitTimeoutError,
)

#: Where the words of the first ring's flag lines lie: csrc/layout.h.
ENTRIES, LINE = 4096, 64
SEQ, CONSUMER_WAITING, PRODUCER_WAITING, SLOT, NBYTES = 0, 8, 16, 24, 32
HEARTBEAT, CLOSED, ATTACHED = 0, 8, 16
ALL_ONES = 2**64 - 1


class Words:
    """The 8-byte words of a segment, through a mapping of the tests' own."""

    def __init__(self, name: str) -> None:
        descriptor = os.open(Path(_ring.shm_directory(), name), os.O_RDWR)
        self._map = mmap.mmap(descriptor, 0)
        os.close(descriptor)

    def __getitem__(self, offset: int) -> int:
        return struct.unpack_from("<Q", self._map, offset)[0]

    def __setitem__(self, offset: int, value: int) -> None:
        struct.pack_into("<Q", self._map, offset, value & ALL_ONES)

    def close(self) -> None:
        self._map.close()


def entry(number: int, word: int) -> int:
    return ENTRIES + LINE * number + word


def end(number: int, word: int) -> int:
    """A word of the creator (0) or the attached end (1)."""
    return 128 + LINE * number + word


@pytest.fixture
def ring() -> Iterator[tuple[ShmRingBuffer, ShmRingBuffer, Words]]:
    """Writer (creator), reader, and the segment's words."""
    with ring_pair() as (writer, reader_end):
        words = Words(writer.name)
        yield writer, reader_end, words
        words.close()


# --- flag words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "values"),
    [
        (SEQ, [2, 3, 4, 5, 1 << 32, (1 << 32) + 1, 1 << 63, ALL_ONES, ALL_ONES - 1]),
        (SLOT, [COUNT, COUNT + 1, 1 << 32, 1 << 52, 1 << 63, ALL_ONES]),
        (NBYTES, [CHUNK + 1, 2 * CHUNK, 1 << 32, 1 << 63, ALL_ONES]),
    ],
    ids=["flag", "slot", "length"],
)
def test_a_reader_refuses_forbidden_words_and_reads_the_other_messages(ring, word, values):
    writer, reader_end, words = ring
    for data in (b"one", b"two", b"three"):
        put(writer, data)
    assert get(reader_end) == b"one"
    good = words[entry(1, word)]
    for value in values:
        words[entry(1, word)] = value
        for timeout in (0, None):
            with pytest.raises(RingCorruptedError, match=f"of segment {writer.name} has a value the protocol forbids"):
                get(reader_end, timeout)
    words[entry(1, word)] = good
    assert get(reader_end) == b"two"
    assert get(reader_end) == b"three"
    put(writer, b"four")
    assert get(reader_end) == b"four"


@pytest.mark.parametrize("value", [1, 3, 4, 5, 1 << 32, 1 << 63, ALL_ONES - 1])
def test_a_writer_refuses_forbidden_flags_and_goes_on(ring, value):
    writer, reader_end, words = ring
    put(writer, b"before")
    good = words[entry(1, SEQ)]
    words[entry(1, SEQ)] = value
    for timeout in (0, None):
        with pytest.raises(RingCorruptedError):
            put(writer, b"refused", timeout)
    assert get(reader_end) == b"before"
    words[entry(1, SEQ)] = good
    put(writer, b"after")
    assert get(reader_end) == b"after"


@pytest.mark.parametrize("value", [1, 2, 7, 1 << 32, ALL_ONES])
def test_the_hint_words_may_hold_anything(ring, value):
    writer, reader_end, words = ring
    for number in range(3 * COUNT):
        for word in (CONSUMER_WAITING, PRODUCER_WAITING):
            words[entry(number % COUNT, word)] = value
        words[end(0, HEARTBEAT)] = words[end(1, HEARTBEAT)] = value * number
        put(writer, bytes([number]))
        assert get(reader_end) == bytes([number])
    with pytest.raises(WaitTimeoutError):
        get(reader_end, 0.05)


@pytest.mark.parametrize("value", [1, 2, 1 << 63, ALL_ONES])
def test_a_forged_goodbye_is_a_goodbye(ring, value):
    writer, reader_end, words = ring
    put(writer, b"last")
    words[end(0, CLOSED)] = value
    assert get(reader_end) == b"last"
    with pytest.raises(ClosedError):
        get(reader_end, None)


def test_a_forged_lock_word_can_only_end_the_connection():
    with ShmRingBuffer(CHUNK, COUNT) as writer:
        words = Words(writer.name)
        words[end(1, ATTACHED)] = 2  # says that an end is there which holds a lock; nobody does
        with pytest.raises(PeerDiedError):
            get(writer, None)
        words.close()


def test_geometry_is_never_read_again(ring):
    """Whatever the header says after the attach, offsets and limits are those of the handshake."""
    writer, reader_end, words = ring
    for offset in range(0, 128, 8):
        words[offset] = ALL_ONES
    for number in range(2 * COUNT):
        put(writer, bytes([number]) * CHUNK)
        assert get(reader_end) == bytes([number]) * CHUNK


def test_a_message_changed_while_it_is_read_was_copied_before():
    """What a reader decided on is its private copy: here the length, after the slot was acquired."""
    with ring_pair() as (writer, reader_end):
        words = Words(writer.name)
        put(writer, b"four")
        with reader_end.acquire_read(0) as view:
            words[entry(0, NBYTES)] = CHUNK
            words[entry(0, SLOT)] = 3
            assert bytes(view) == b"four"
        put(writer, b"next")
        assert get(reader_end) == b"next"
        words.close()


@pytest.mark.parametrize("seed", range(4))
def test_random_words_are_never_worse_than_an_error(seed):
    random = Random(seed)
    values = [0, 1, 2, 3, 4, 5, COUNT, CHUNK, CHUNK + 1, 1 << 31, 1 << 32, 1 << 63, ALL_ONES - 1, ALL_ONES]
    outcomes = {"passed": 0, "refused": 0}
    for _ in range(100):
        with ring_pair() as (writer, reader_end):
            words = Words(writer.name)
            for _ in range(20):
                if random.random() < 0.3:
                    offset = random.choice(
                        [entry(random.randrange(COUNT), 8 * random.randrange(8)), end(0, 0), end(1, 0)]
                    )
                    words[offset] = random.choice([*values, words[offset] + 1, words[offset] - 1])
                try:
                    if random.random() < 0.5:
                        put(writer, b"x" * random.randrange(CHUNK), 0)
                    else:
                        assert len(get(reader_end, 0)) <= CHUNK
                    outcomes["passed"] += 1
                except TsqpError:
                    outcomes["refused"] += 1
            words.close()
    assert min(outcomes.values()) > 100


# --- headers --------------------------------------------------------------------------------------------------

GOOD = raw((2, 3), (5,), meta=b"\x81\xa1x\x01")
_BIG = 1 << 62

MALFORMED = {
    "magic": (replace(GOOD, magic=0x4D515355), MagicError),
    "magic of zeros": (replace(GOOD, magic=0), MagicError),
    "version 0": (replace(GOOD, version=0), VersionError),
    "version 2": (replace(GOOD, version=2), VersionError),
    "header length 127": (replace(GOOD, header_bytes=127), VersionError),
    "header length 0": (replace(GOOD, header_bytes=0), VersionError),
    **{f"reserved word {i}": (replace(GOOD, reserved=[int(i == k) for k in range(7)]), VersionError) for i in range(7)},
    "65 tensors": (replace(GOOD, tensor_count=65), TooManyTensorsError),
    "2^32 - 1 tensors": (replace(GOOD, tensor_count=2**32 - 1), TooManyTensorsError),
    "meta over the limit": (replace(GOOD, meta_bytes=65537), MetaError),
    "meta of 4 GiB": (replace(GOOD, meta_bytes=2**32 - 1), MetaError),
    "meta past the slot": (replace(GOOD, meta_bytes=65000, total=1 << 40), TruncatedMessageError),
    "descriptors past the slot": (replace(raw((1,)), tensor_count=64, total=1 << 40), TruncatedMessageError),
    "total 0": (replace(GOOD, total=0), TruncatedMessageError),
    "total one less": (replace(GOOD, total=len(GOOD.pack()) - 1), TruncatedMessageError),
    "total one more": (replace(GOOD, total=len(GOOD.pack()) + 1), TruncatedMessageError),
    "total one block more": (replace(GOOD, total=len(GOOD.pack()) + 64), TruncatedMessageError),
    "total 2^64 - 1": (replace(GOOD, total=ALL_ONES), TruncatedMessageError),
    "fewer tensors than bytes": (replace(GOOD, tensor_count=1, total=len(GOOD.pack())), TsqpError),
    "dtype 0": (with_desc(GOOD, 0, code=0), DTypeError),
    "dtype 15": (with_desc(GOOD, 1, code=15), DTypeError),
    "dtype 255": (with_desc(GOOD, 0, code=255), DTypeError),
    "ndim 9": (with_desc(GOOD, 0, ndim=9), RankError),
    "ndim 255": (with_desc(GOOD, 1, ndim=255), RankError),
    "a dimension of -1": (with_desc(GOOD, 0, shape=(-1, 3)), ShapeError),
    "two negative dimensions": (with_desc(GOOD, 0, shape=(-2, -3)), ShapeError),
    "a dimension of -2^63": (with_desc(GOOD, 0, shape=(-(2**63),)), ShapeError),
    "a shape that wraps to its nbytes": (with_desc(GOOD, 0, shape=(_BIG, 4, 1), nbytes=0), ShapeError),
    "a shape that wraps to 24 bytes": (with_desc(GOOD, 0, shape=(2**61 + 6,), nbytes=24), ShapeError),
    "2^32 by 2^32": (with_desc(GOOD, 0, shape=(2**32, 2**32), nbytes=0), ShapeError),
    "empty, but with absurd dimensions": (with_desc(GOOD, 0, shape=(0, _BIG, _BIG), nbytes=0), ShapeError),
    "2^60 floats": (with_desc(GOOD, 1, shape=(2**60,), nbytes=2**62), ShapeError),
    "dimensions beyond ndim": (with_desc(GOOD, 0, ndim=1), TsqpError),
    "a dimension beyond ndim": (with_desc(GOOD, 1, shape=(5, 1), ndim=1), ShapeError),
    "nbytes one more": (with_desc(GOOD, 0, nbytes=25), SizeMismatchError),
    "nbytes one less": (with_desc(GOOD, 1, nbytes=19), SizeMismatchError),
    "nbytes 0": (with_desc(GOOD, 0, nbytes=0), SizeMismatchError),
    "nbytes 2^64 - 1": (with_desc(GOOD, 0, nbytes=ALL_ONES), SizeMismatchError),
    "nbytes of another dtype": (with_desc(GOOD, 0, code=4), SizeMismatchError),
    "encoding 3": (with_desc(GOOD, 0, encoding=3), EncodingError),
    "encoding 255": (with_desc(GOOD, 1, encoding=255), EncodingError),
    "bfloat16 in as many bytes as float32": (with_desc(GOOD, 0, encoding=1), SizeMismatchError),
    "int64 as int8": (with_desc(GOOD, 0, code=8, encoding=2), DTypeError),
    "bfloat16 as bfloat16": (with_desc(GOOD, 0, code=3, encoding=1), DTypeError),
    "int8 without room for its scales": (with_desc(GOOD, 0, encoding=2, nbytes=6), SizeMismatchError),
    "offset 0": (with_desc(GOOD, 0, offset=0), OffsetError),
    "offset in the descriptors": (with_desc(GOOD, 0, offset=128), OffsetError),
    "offset misaligned": (with_desc(GOOD, 0, offset=GOOD.descs[0].offset + 4), OffsetError),
    "offset of the other tensor": (with_desc(GOOD, 1, offset=GOOD.descs[0].offset), OffsetError),
    "offset past the slot": (with_desc(GOOD, 1, offset=1 << 20), OffsetError),
    "offset 2^64 - 64": (with_desc(GOOD, 0, offset=2**64 - 64), OffsetError),
    **{
        f"reserved {i} of a tensor": (with_desc(GOOD, 1, reserved=tuple(int(i == k) for k in range(3))), VersionError)
        for i in range(3)
    },
}


@pytest.fixture
def target() -> Iterator[Reader]:
    with reader(1 << 16, 2) as made:
        yield made


def assert_still_works(target: Reader) -> None:
    target.put(GOOD.pack())
    message = target.read()
    assert [list(tensor.shape) for tensor in message.tensors] == [[2, 3], [5]]
    assert message.meta == {"x": 1}


@pytest.mark.parametrize("way", ["read", "lease"])
@pytest.mark.parametrize("name", MALFORMED)
def test_each_malformed_header_has_its_own_error_and_the_next_message_arrives(target, name, way):
    message, error = MALFORMED[name]
    for _ in range(3):  # more often than there are slots: none is lost
        target.put(message.pack())
        with pytest.raises(TsqpError) as caught:
            getattr(target, way)()
        if error is not TsqpError:
            assert type(caught.value) is error
    assert_still_works(target)


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 127, 128, 200, 223, 319, 320, 383, 384, 447, 448, 511])
def test_a_message_cut_short_is_refused(target, cut):
    data = GOOD.pack()
    assert cut < len(data) == 512
    target.put(data[:cut])
    with pytest.raises(TruncatedMessageError):
        target.read()
    assert_still_works(target)


@pytest.mark.parametrize("flag", [FLAG_VIA_ZMQ, FLAG_TILED], ids=["via zmq", "tiled"])
@pytest.mark.parametrize("way", ["read", "lease"])
def test_a_note_that_claims_tensors_reads_nothing_outside_its_slot(target, way, flag):
    """Its payload is elsewhere, so its total may be larger than the slot: nothing may be taken from here."""
    shape = (1 << 36,)
    huge = replace(Raw([raw((1,)).descs[0]]), flags=flag, total=256 + (4 << 36))
    huge = with_desc(huge, 0, shape=shape, nbytes=4 << 36, offset=256)
    target.put(huge.pack()[:256])
    try:
        message = getattr(target, way)()
    except TsqpError:
        pass
    else:
        assert message.tensors == []
    assert_still_works(target)


@pytest.mark.watchdog(120)
def test_random_mutations_are_never_worse_than_an_error(start_peer):
    """In a process with a cap on its memory: no crash, no hang, no allocation that a header asks for."""
    peer = start_peer(mutations.mutate_messages, 5000, 11)
    outcomes = peer.hear()
    assert peer.join() == 0
    assert outcomes.pop("wrong") == []
    assert outcomes["refused"] > 1000
    assert outcomes["valid"] > 100
    assert sum(outcomes.values()) == 5000


def test_layout_of_the_tests_own_bytes():
    assert (HEADER.size, DESC.size) == (128, 96)
    assert PATIENCE_S > 1
