"""The life of a segment: creating it, and attaching to it with every check."""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest
from test_ring import get, put, start_ring_end

from tsqp import ShmRingBuffer, _ring, segments
from tsqp.errors import (
    ConfigError,
    RingUsageError,
    SegmentError,
    SegmentExistsError,
    SegmentFormatError,
    SegmentGeometryError,
    SegmentNotFoundError,
    SegmentPermissionError,
    SegmentTruncatedError,
    SegmentVersionError,
)

CHUNK, COUNT = 4096, 4
#: Offset of the first of the 8-byte words in a segment's first page, as csrc/layout.h has it.
TAG = 0


@pytest.fixture
def ring() -> Iterator[ShmRingBuffer]:
    with ShmRingBuffer(CHUNK, COUNT) as ring:
        yield ring


def file_of(ring: ShmRingBuffer) -> Path:
    return Path(_ring.shm_directory(), ring.name)


def read_word(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return struct.unpack("<Q", file.read(8))[0]


def write_word(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<Q", value & (1 << 64) - 1))


def attach_and_use(ring: ShmRingBuffer) -> None:
    """The segment is whole: a second end attaches and gets a message."""
    with ShmRingBuffer(*ring.handle()) as other:
        put(ring, b"still works")
        assert get(other) == b"still works"


def held_of(name: str) -> list[str]:
    """Descriptors and mappings this process has of the segment."""
    held = [line for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            held.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # the one of the listing itself
    return [entry for entry in held if name in entry]


# --- creating -------------------------------------------------------------------------------------------------


def test_a_new_segment_is_private_reserved_and_named_at_random(shm_directory):
    with ShmRingBuffer(1 << 20, 3) as ring, ShmRingBuffer(1 << 20, 3) as other:
        info = file_of(ring).stat()
        assert stat.S_IMODE(info.st_mode) == 0o600
        assert info.st_size == ring.segment.nbytes > 3 << 20
        assert info.st_blocks * 512 >= info.st_size  # reserved: no SIGBUS later
        assert ring.name.startswith("tsqp-")
        assert len(ring.name) >= len("tsqp-") + 32
        assert other.name != ring.name
        assert other.handle().session != ring.handle().session
    assert not any(shm_directory.iterdir())


def test_the_default_directory_is_dev_shm(monkeypatch):
    monkeypatch.delenv("TSQP_SHM_DIR")
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this system has no /dev/shm")
    with ShmRingBuffer(CHUNK, COUNT) as ring:
        assert Path("/dev/shm", ring.name).exists()
        attach_and_use(ring)
    assert not Path("/dev/shm", ring.name).exists()


def test_unlinking_early_leaves_both_mappings_usable(ring):
    with ShmRingBuffer(*ring.handle()) as other:
        ring.unlink()
        assert not file_of(ring).exists()
        put(ring, b"unlinked")
        assert get(other) == b"unlinked"
        ring.unlink()


def test_only_the_creator_unlinks(ring):
    other = ShmRingBuffer(*ring.handle())
    other.unlink()
    other.close()
    del other
    assert file_of(ring).exists()


def test_a_fixed_name_is_used_once(shm_directory):
    name = "tsqp-fixed.name_1"
    with ShmRingBuffer(CHUNK, COUNT, name, create=True) as ring:
        assert ring.name == name
        with pytest.raises(SegmentExistsError, match=f"segment {name} exists already"):
            ShmRingBuffer(CHUNK, COUNT, name, create=True)
        with ShmRingBuffer(CHUNK, COUNT, name) as other:  # the name alone is enough to attach
            put(ring, b"x")
            assert get(other) == b"x"
    with ShmRingBuffer(CHUNK, COUNT, name, create=True) as ring:
        assert [entry.name for entry in shm_directory.iterdir()] == [name]


@pytest.mark.parametrize(
    "name", ["ring", "", "tsq", "tsqp/../x", "../tsqp", "tsqp x", "tsqp\n", "tsqpé", "tsqp" + 60 * "x"]
)
def test_an_invalid_name_is_refused(name):
    for create in (True, False):
        with pytest.raises(ConfigError, match="invalid name"):
            ShmRingBuffer(CHUNK, COUNT, name, create=create)


@pytest.mark.parametrize(
    ("chunk", "count"),
    [
        *[(63, 4), (0, 4), (-1, 4), (2**40 + 1, 4), (2**64, 4)],
        *[(4096, 0), (4096, -1), (4096, 1025), (4096, 2**64)],
        *[(4096.0, 4), ("4096", 4), (4096, None)],
    ],
)
def test_a_geometry_out_of_range_is_refused(chunk, count, shm_directory):
    with pytest.raises(SegmentGeometryError):
        ShmRingBuffer(chunk, count)
    with pytest.raises(SegmentGeometryError):
        ShmRingBuffer(chunk, count, "tsqp-some", b"x" * 16)
    assert not any(shm_directory.iterdir())


@pytest.mark.parametrize(("chunk", "count"), [(64, 1), (64, 1024), (65, 2), (4095, 3), (4097, 3)])
def test_geometries_at_the_limits_work(chunk, count):
    with ShmRingBuffer(chunk, count) as ring, ShmRingBuffer(*ring.handle()) as other:
        for number in range(2 * count):
            put(ring, bytes([number % 256]) * chunk, 0)
            assert get(other, 0) == bytes([number % 256]) * chunk


# --- attaching ------------------------------------------------------------------------------------------------


def test_attaching_to_a_name_that_does_not_exist():
    with pytest.raises(SegmentNotFoundError, match="segment tsqp-nobody does not exist; is its creator still running"):
        ShmRingBuffer(CHUNK, COUNT, "tsqp-nobody")
    with pytest.raises(FileNotFoundError):
        ShmRingBuffer(CHUNK, COUNT, "tsqp-nobody")


@pytest.mark.parametrize(
    ("tag", "error"),
    [
        (0, SegmentFormatError),
        (0x0167657370717375, SegmentFormatError),
        (2**64 - 1, SegmentFormatError),
        (0x0067657370717374, SegmentVersionError),
        (0x0267657370717374, SegmentVersionError),
        (0xFF67657370717374, SegmentVersionError),
    ],
)
def test_wrong_magic_and_wrong_version_are_told_apart(ring, tag, error):
    good = read_word(file_of(ring), TAG)
    assert good == 0x0167657370717374  # "tsqpseg", version 1
    write_word(file_of(ring), TAG, tag)
    with pytest.raises(error, match=ring.name):
        ShmRingBuffer(*ring.handle())
    write_word(file_of(ring), TAG, good)
    attach_and_use(ring)


@pytest.mark.parametrize(
    "change", [{"max_chunk_bytes": 4095}, {"max_chunk_bytes": 64}, {"max_chunks": 3}, {"max_chunks": 1}]
)
def test_another_geometry_than_the_segments_is_refused(ring, change):
    with pytest.raises(SegmentGeometryError, match=f"segment {ring.name} can.t have this geometry"):
        ShmRingBuffer(*ring.handle()._replace(**change))
    attach_and_use(ring)


def test_a_segment_of_two_rings_is_not_a_ring_buffer():
    segment = _ring.Segment.create(CHUNK, COUNT, 2)
    with pytest.raises(SegmentGeometryError):
        ShmRingBuffer(CHUNK, COUNT, segment.name)


@pytest.mark.parametrize("word", range(3, 7))
def test_a_header_that_lies_about_its_geometry_is_refused(ring, word):
    good = read_word(file_of(ring), 8 * word)
    for value in (0, good + 1, good - 1, 2**64 - 1):
        write_word(file_of(ring), 8 * word, value)
        with pytest.raises(SegmentGeometryError):
            ShmRingBuffer(*ring.handle())
    write_word(file_of(ring), 8 * word, good)
    attach_and_use(ring)


@pytest.mark.parametrize("cut", [0, 1, 100, 4096, 8192, -1])
def test_a_truncated_segment_is_refused(ring, cut):
    content = file_of(ring).read_bytes()
    copy = file_of(ring).with_name("tsqp-truncated")
    copy.write_bytes(content[:cut])
    try:
        with pytest.raises(SegmentTruncatedError, match="shorter than its geometry needs"):
            ShmRingBuffer(*ring.handle()._replace(name=copy.name))
    finally:
        copy.unlink()


def test_another_session_than_the_handles_is_refused(ring):
    other_session = bytes(16)
    with pytest.raises(SegmentGeometryError, match="another session"):
        ShmRingBuffer(*ring.handle()._replace(session=other_session))
    for half in (0, 8):  # each half counts
        session = bytearray(ring.handle().session)
        session[half] ^= 1
        with pytest.raises(SegmentGeometryError, match="another session"):
            ShmRingBuffer(*ring.handle()._replace(session=bytes(session)))
    with pytest.raises(ConfigError, match="16 bytes"):
        ShmRingBuffer(*ring.handle()._replace(session=b"short"))
    attach_and_use(ring)


def test_a_second_attach_is_refused_while_the_first_lives(ring, start_peer):
    peer = start_ring_end(start_peer, ring.handle())
    with pytest.raises(RingUsageError, match="already has its second end attached"):
        ShmRingBuffer(*ring.handle())
    peer.ask("write", b"undisturbed")
    assert get(ring) == b"undisturbed"


def test_of_attachers_that_race_exactly_one_wins(start_peer):
    """The winner's end has its lock, so that its death is noticed; the others are told."""
    racers = [start_peer(peers.attacher) for _ in range(3)]
    assert [racer.hear() for racer in racers] == ["made"] * 3
    for number in range(30):
        with ShmRingBuffer(CHUNK, COUNT) as ring:
            when = time.monotonic() + 0.005
            for racer in racers:
                racer.say(("attach", ring.handle(), when))
            outcomes = [racer.hear() for racer in racers]
            assert sorted(outcomes) == ["RingUsageError", "RingUsageError", "attached"]
            racers[outcomes.index("attached")].ask("write", bytes([number]))
            assert get(ring) == bytes([number])
            for racer in racers:
                racer.ask("detach")


def test_an_attacher_that_is_killed_leaves_the_end_free(ring, start_peer):
    peer = start_ring_end(start_peer, ring.handle())
    peer.kill()
    attach_and_use(ring)


def test_a_segment_has_no_name_before_it_is_whole(start_peer, shm_directory):
    """Killed while it creates segments, a process leaves nothing, or what the next start recognises and reaps."""
    for number in range(30):
        peer = start_peer(peers.create_segments_for_ever)
        peer.hear()
        time.sleep(number / 2000)
        peer.kill()
        found = segments.leftovers()
        assert [left.name for left in found] == [entry.name for entry in shm_directory.iterdir()]
        segments.reap(found)
        assert not any(shm_directory.iterdir())


def test_things_that_are_no_segment_files_are_refused(ring, shm_directory):
    names = {kind: shm_directory / f"tsqp-{kind}" for kind in ("directory", "link", "fifo", "socket", "text")}
    names["directory"].mkdir()
    names["link"].symlink_to(file_of(ring))
    os.mkfifo(names["fifo"])
    names["text"].write_bytes(b"no segment " * 10_000)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(names["socket"]))
        try:
            for kind, path in names.items():
                error = SegmentFormatError if kind == "text" else SegmentError
                with pytest.raises(error, match=path.name):
                    ShmRingBuffer(*ring.handle()._replace(name=path.name))
        finally:
            names.pop("directory").rmdir()
            for path in names.values():
                path.unlink()
    attach_and_use(ring)


def test_a_segment_that_may_not_be_opened(ring, start_peer):
    if os.geteuid() == 0:
        peer = start_peer(peers.become_nobody_and_attach, ring.handle())
        with pytest.raises(SegmentPermissionError, match="may not be opened by this user"):
            peer.hear()
    else:
        file_of(ring).chmod(0)
        with pytest.raises(SegmentPermissionError, match="may not be opened by this user"):
            ShmRingBuffer(*ring.handle())


def test_refused_attaches_leave_no_descriptor_and_no_mapping(ring):
    before = held_of(ring.name)
    assert before
    write_word(file_of(ring), TAG, 0)
    for _ in range(20):
        with pytest.raises(SegmentFormatError):
            ShmRingBuffer(*ring.handle())
    assert held_of(ring.name) == before


def test_closed_rings_leave_no_descriptor_and_no_mapping():
    with ShmRingBuffer(CHUNK, COUNT) as ring:
        name = ring.name
        attach_and_use(ring)
        assert held_of(name)
    del ring
    assert held_of(name) == []
