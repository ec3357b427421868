"""The segment under a fixed name, which an enclave's manifest lists: it is there when the enclave starts."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
from carriers import CARRIERS, CHUNK, COUNT, LARGE, SMALL
from ends import assert_works, client_of, path_of
from patience import until
from peers import PATIENCE_S, Peer
from wire_bytes import check_numbered, numbered

import tsqp
from tsqp import fixed_segment, segments, transport
from tsqp.errors import SegmentExistsError, SegmentPermissionError, SharedMemoryFullError
from tsqp.listener import Listener
from tsqp.transport import Channel

StartPeer = Callable[..., Peer]

FIXED = "tsqp-fixed"
INSIDE = {"TSQP_ENCLAVE": "gramine"}


@pytest.fixture
def fixed() -> Iterator[Listener]:
    """Over TCP, as a runner in Gramine needs it."""
    with tsqp.listen("tcp://127.0.0.1:0", **CARRIERS["ring-tcp"].listen_options, shm_name=FIXED) as listener:
        yield listener


@contextmanager
def enclave_of(listener: Listener, start_peer: StartPeer, **env: str) -> Iterator[tuple[Channel, Peer]]:
    """The server's channel to a client that takes itself for an enclave, and that client."""
    peer = start_peer(peers.channel_end, "client", listener.endpoint, {}, env={**INSIDE, **env})
    with listener.accept(PATIENCE_S) as channel:
        assert peer.hear() == "made"
        peer.say(("echo", 2))
        for number, nbytes in enumerate([SMALL, LARGE]):
            channel.send([numbered(number, nbytes)], request_id=number, timeout=PATIENCE_S)
            check_numbered(channel.recv(PATIENCE_S), number, nbytes)
        assert peer.hear() == 2
        yield channel, peer


def names(shm_directory: Path) -> list[str]:
    return sorted(entry.name for entry in shm_directory.iterdir())


def file_of(shm_directory: Path) -> int | None:
    """Which file has the fixed name now."""
    try:
        return (shm_directory / FIXED).stat().st_ino
    except FileNotFoundError:
        return None


def test_the_segment_with_the_fixed_name_is_there_whole_before_any_client(fixed, shm_directory):
    assert names(shm_directory) == [FIXED]
    info = (shm_directory / FIXED).stat()
    assert info.st_size > 2 * COUNT * CHUNK
    assert info.st_blocks * 512 >= 2 * COUNT * CHUNK  # reserved, not only promised
    assert info.st_mode & 0o777 == 0o600
    assert segments.leftovers() == []
    fixed.close()
    assert names(shm_directory) == []


def test_each_enclave_in_turn_finds_a_file_of_its_own_under_the_fixed_name(fixed, start_peer, shm_directory):
    files = [file_of(shm_directory)]
    for _ in range(3):
        with enclave_of(fixed, start_peer) as (channel, peer):
            assert channel.transport == "shm+tcp"
            assert names(shm_directory) == [FIXED]
            assert file_of(shm_directory) == files[-1]
            peer.ask("close")
        until(lambda: file_of(shm_directory) not in (None, files[-1]))
        files.append(file_of(shm_directory))
        assert names(shm_directory) == [FIXED]


def test_after_an_enclave_was_killed_the_next_finds_a_file(fixed, start_peer, shm_directory):
    """The server still holds its channel to the dead one: its memory is not the next one's."""
    before = file_of(shm_directory)
    with enclave_of(fixed, start_peer) as (_, peer):
        peer.kill()
        until(lambda: file_of(shm_directory) not in (None, before))
        with enclave_of(fixed, start_peer) as (channel, _):
            assert channel.transport == "shm+tcp"


def test_a_native_client_leaves_the_fixed_name_to_an_enclave(fixed, start_peer, shm_directory):
    """Its segment needs no name once both ends have it mapped."""
    with client_of(fixed, CARRIERS["ring-tcp"]) as first, client_of(fixed, CARRIERS["ring-tcp"]) as second:
        assert first[0]._tx.segment.session != second[0]._tx.segment.session
        with enclave_of(fixed, start_peer) as (channel, _):
            assert channel.transport == "shm+tcp"
            assert names(shm_directory) == [FIXED]
            assert_works(*first)
            assert_works(*second)


def test_an_enclave_without_its_file_falls_back_to_zeromq(fixed, start_peer, shm_directory):
    """The second is offered a random name, which is not the one file of its manifest. Here a directory with a link to
    that file is the mount."""
    with tempfile.TemporaryDirectory(dir=shm_directory.parent) as mount:
        os.link(shm_directory / FIXED, Path(mount) / FIXED)
        with enclave_of(fixed, start_peer, TSQP_SHM_DIR=mount) as (first, _):
            assert first.transport == "shm+tcp"
            with enclave_of(fixed, start_peer, TSQP_SHM_DIR=mount) as (second, peer):
                assert second.transport == "tcp"
                assert peer.ask("stats")["shm_transfers"] == 0


def test_in_an_enclave_a_file_that_may_not_be_opened_is_one_that_is_not_there(fixed, shm_directory, monkeypatch):
    """So answers Gramine for what is no allowed file; elsewhere it is an error that has to be mended."""
    before = file_of(shm_directory)

    def refuse(*_: object) -> None:
        raise SegmentPermissionError(errno.EACCES, "no allowed file")

    monkeypatch.setattr(transport, "Segment", SimpleNamespace(attach=refuse))
    with pytest.raises(SegmentPermissionError):
        tsqp.connect(fixed.endpoint, PATIENCE_S)
    # The server is in this process too, and makes none once it takes itself for an enclave.
    until(lambda: file_of(shm_directory) not in (None, before))
    monkeypatch.setenv("TSQP_ENCLAVE", "gramine")
    with client_of(fixed, CARRIERS["ring-tcp"]) as both:
        assert {channel.transport for channel in both} == {"tcp"}
        assert_works(*both)


def test_a_client_that_does_not_map_the_fixed_segment_does_not_keep_it(fixed, start_peer, shm_directory, tmp_path):
    before = file_of(shm_directory)
    with enclave_of(fixed, start_peer, TSQP_SHM_DIR=str(tmp_path)) as (channel, _):
        assert channel.transport == "tcp"
        until(lambda: file_of(shm_directory) not in (None, before))


def test_two_servers_cannot_have_one_name(fixed, endpoint):
    with pytest.raises(SegmentExistsError, match=FIXED):
        tsqp.listen(endpoint, **CARRIERS["ring"].listen_options, shm_name=FIXED)
    assert not path_of(endpoint).exists()


def test_a_name_from_the_environment_can_be_declined(endpoint, monkeypatch, shm_directory):
    monkeypatch.setenv("TSQP_SHM_NAME", FIXED)
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options, shm_name=""):
        assert names(shm_directory) == []
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options):
        assert names(shm_directory) == [FIXED]


def test_a_fixed_segment_that_cannot_be_made_anew_is_made_later(fixed, start_peer, shm_directory, monkeypatch):
    """As where memory is scarce. Clients that come meanwhile have segments of their own."""
    refused = []

    def refuse(*_: object) -> None:
        refused.append(True)
        raise SharedMemoryFullError(errno.ENOSPC, "full")

    with monkeypatch.context() as scarce:
        scarce.setattr(fixed_segment, "_RETRY_S", 0.02)
        scarce.setattr(fixed_segment, "Segment", SimpleNamespace(create=refuse))
        with enclave_of(fixed, start_peer):
            pass
        until(lambda: len(refused) > 1)
        assert names(shm_directory) == []
        with client_of(fixed, CARRIERS["ring-tcp"]) as both:
            assert {channel.transport for channel in both} == {"shm+tcp"}
            assert_works(*both)
    until(lambda: names(shm_directory) == [FIXED])


def test_what_a_killed_server_left_under_the_fixed_name_is_no_obstacle(start_peer, endpoint, shm_directory):
    options = {**CARRIERS["ring"].listen_options, "shm_name": FIXED}
    peer = start_peer(peers.channel_end, "server", endpoint, options)
    assert peer.hear() == "made"
    assert names(shm_directory) == [FIXED]
    peer.kill()
    assert [leftover.name for leftover in segments.leftovers()] == [FIXED]
    path_of(endpoint).unlink()
    with tsqp.listen(endpoint, **options) as listener, client_of(listener, CARRIERS["ring"]) as both:
        assert both[0].transport == "shm+ipc"
        assert_works(*both)
