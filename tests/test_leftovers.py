"""Where segments lie: directories that are full or missing, forks and other processes, what the dead leave behind."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import peers
import pytest
from peers import PATIENCE_S, Peer
from test_ring import get, start_ring_end
from test_segments import attach_and_use, read_word, write_word

from tsqp import RingHandle, ShmRingBuffer, _ring, segments
from tsqp.errors import PeerDiedError, SegmentError, SegmentNotFoundError, SharedMemoryFullError

CHUNK, COUNT = 4096, 4
#: Offsets of 8-byte words in a segment's first page, as csrc/layout.h has them.
OWNER_PID, OWNER_START, OWNER_PIDNS = 56, 64, 72
StartPeer = Callable[..., Peer]


@pytest.fixture
def ring() -> Iterator[ShmRingBuffer]:
    with ShmRingBuffer(CHUNK, COUNT) as ring:
        yield ring


# --- directories that are full or missing ---------------------------------------------------------------------


def test_a_segment_larger_than_the_file_system_is_refused_at_once(shm_directory):
    info = os.statvfs(shm_directory)
    total = info.f_blocks * info.f_frsize
    if not 0 < total < 1 << 50:
        pytest.skip(f"{shm_directory} is on a file system without a limit")
    with pytest.raises(SharedMemoryFullError) as caught:
        ShmRingBuffer(min(total, 1 << 40), 1024)
    text = str(caught.value)
    assert str(shm_directory) in text
    assert "bytes free" in text
    assert "--shm-size" in text
    assert "TSQP_MAX_SHM_CHUNK_BYTES" in text
    assert not any(shm_directory.iterdir())


def test_a_full_file_system_is_an_error_with_the_fix_and_never_a_sigbus(tmp_path, monkeypatch):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"can't mount a small tmpfs here ({mount.stderr.strip()})")
    monkeypatch.setenv("TSQP_SHM_DIR", str(tmp_path))
    try:
        fill_and_use(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def fill_and_use(directory: Path) -> None:
    with ShmRingBuffer(1 << 18, 3):
        with pytest.raises(SharedMemoryFullError, match=r"has \d+ bytes free but a new segment needs \d+") as caught:
            ShmRingBuffer(1 << 18, 3)
        assert str(directory) in str(caught.value)
        assert len(list(directory.iterdir())) == 1
        with ShmRingBuffer(1 << 14, 3) as small:
            attach_and_use(small)
    with ShmRingBuffer(1 << 18, 3) as ring:
        attach_and_use(ring)


def test_a_missing_directory_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TSQP_SHM_DIR", str(tmp_path / "missing"))
    with pytest.raises(SegmentError, match=rf"{tmp_path}/missing, .* does not exist; mount a tmpfs there"):
        ShmRingBuffer(CHUNK, COUNT)
    with pytest.raises(SegmentNotFoundError):
        ShmRingBuffer(CHUNK, COUNT, "tsqp-x")
    assert segments.leftovers() == []


# --- processes ------------------------------------------------------------------------------------------------


def test_a_forked_child_cannot_use_what_it_inherits_and_harms_nothing(ring, start_peer):
    peer = start_peer(peers.fork_uses_ring, ring.handle())
    outcomes = peer.hear()
    assert outcomes == [f"{name}: fork" for name in ("end write", "end read", "write", "read", "handle", "unlink")]
    assert peer.hear() == (b"two", True)
    assert get(ring) == b"parent"
    peer.say("end")
    assert peer.join() == 0


def test_a_forked_child_does_not_keep_its_dead_parent_alive(ring, start_peer):
    peer = start_ring_end(start_peer, ring.handle())
    child = peer.ask("fork_and_sleep")
    peer.kill()
    try:
        with pytest.raises(PeerDiedError):
            get(ring, PATIENCE_S)
    finally:
        os.kill(child, 9)


def test_a_spawned_child_attaches_with_the_pickled_handle(ring):
    process = multiprocessing.get_context("spawn").Process(target=peers.spawned_writer, args=(ring.handle(), b"hello"))
    process.start()
    assert get(ring) == b"hello"
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    process.close()


# --- leftovers ------------------------------------------------------------------------------------------------


def killed_creator(start_peer: StartPeer) -> tuple[Peer, str]:
    """A process that made a segment and was killed, and the segment's name."""
    peer = start_peer(peers.hold_segment)
    name = peer.hear()
    peer.kill()
    return peer, name


def test_what_a_killed_creator_left_is_found_and_reaped(ring, start_peer, shm_directory):
    peer, name = killed_creator(start_peer)
    alive = start_peer(peers.hold_segment).hear()
    found = segments.leftovers()
    assert [(left.name, left.pid) for left in found] == [(name, peer.pid)]
    assert found[0].nbytes == (shm_directory / name).stat().st_size
    assert segments.reap(found) == found[0].nbytes
    assert not (shm_directory / name).exists()
    assert segments.reap(found) == 0
    assert (shm_directory / alive).exists()
    attach_and_use(ring)
    (shm_directory / alive).unlink()


def test_files_of_others_are_never_judged_leftovers(start_peer, shm_directory):
    _, name = killed_creator(start_peer)
    left = shm_directory / name
    content = left.read_bytes()
    foreign = {kind: shm_directory / kind for kind in ("other-name", "tsqp-notes.txt", "tsqp-short", "tsqp-empty")}
    foreign["other-name"].write_bytes(content)  # ours in all but name
    foreign["tsqp-notes.txt"].write_text("not a segment\n" * 1000)
    foreign["tsqp-short"].write_bytes(content[:4000])
    foreign["tsqp-empty"].touch()
    directory, link = shm_directory / "tsqp-directory", shm_directory / "tsqp-link"
    directory.mkdir()
    link.symlink_to(left)
    if os.geteuid() == 0:
        foreign["tsqp-nobodys"] = shm_directory / "tsqp-nobodys"
        foreign["tsqp-nobodys"].write_bytes(content)
        os.chown(foreign["tsqp-nobodys"], 65534, 65534)
    try:
        found = segments.leftovers()
        assert [leftover.name for leftover in found] == [name]
        segments.reap(found)
        assert not left.exists()
        assert all(path.exists() for path in foreign.values())
    finally:
        directory.rmdir()
        link.unlink()
        for path in foreign.values():
            path.unlink()


def test_owners_are_judged_by_start_time_lock_and_pid_namespace(start_peer, shm_directory):
    _, name = killed_creator(start_peer)
    path = shm_directory / name

    def is_leftover() -> bool:
        return [left.name for left in segments.leftovers()] == [name]

    assert is_leftover()
    namespace = read_word(path, OWNER_PIDNS)
    write_word(path, OWNER_PIDNS, namespace + 1)  # a pid means nothing in another namespace
    assert not is_leftover()
    write_word(path, OWNER_PIDNS, namespace)
    write_word(path, OWNER_PID, os.getpid())  # the pid was given to another process since
    assert is_leftover()
    write_word(path, OWNER_START, _ring.process_start(os.getpid()))  # the owner lives
    assert not is_leftover()
    path.unlink()


def test_a_leftover_replaced_meanwhile_is_not_removed(start_peer, shm_directory):
    _, name = killed_creator(start_peer)
    found = segments.leftovers()
    (shm_directory / name).unlink()
    with ShmRingBuffer(CHUNK, COUNT, name, create=True):
        assert segments.reap(found) == 0
        assert (shm_directory / name).exists()


def test_process_facts():
    text = Path("/proc/self/stat").read_text()
    assert _ring.process_start(os.getpid()) == int(text.rpartition(")")[2].split()[19])
    assert _ring.process_start(2**22 + 1) is None
    assert _ring.pid_namespace() == os.stat("/proc/self/ns/pid").st_ino
    assert _ring.segment_owner("tsqp-none") is None
    assert RingHandle._fields == ("max_chunk_bytes", "max_chunks", "name", "session")
