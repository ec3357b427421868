"""What users of systems like this one ran into, where no other test already makes sure that ours do not."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import lives
import msgpack
import peers
import pytest
from carriers import CARRIERS, LARGE
from patience import until
from peers import PATIENCE_S
from wire_bytes import numbered, raw, reader

import tsqp
from tsqp import ShmRingBuffer
from tsqp.errors import ConfigError, EndpointError, MetaError, SegmentError
from tsqp.listener import check_endpoint

SOURCES = Path(tsqp.__file__).parent


# --- an idle end costs nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["auto", "block", "poll"])
def test_idle_ends_use_next_to_no_processor(endpoint, start_peer, wait):
    """Processor time, so that what else the machine does is not counted. The bar is 1% over longer.

    Polling wakes a thousand times a second, which a virtual machine may make dear: a spinning end would use all.
    """
    seconds = 3.0
    server = start_peer(lives.idler, "server", endpoint, wait)
    assert server.hear() == "listening"
    client = start_peer(lives.idler, "client", endpoint, wait)
    both = (server, client)
    assert [peer.hear() for peer in both] == ["exchanged"] * 2
    for peer in both:
        peer.say(seconds)
    shares = [peer.hear() / seconds for peer in both]
    for peer in reversed(both):
        peer.say("end")
        assert peer.join() == 0
    assert max(shares) < (0.15 if wait == "poll" else 0.03), f"server and client: {shares}"


# --- nothing a peer sends is code -------------------------------------------------------------------------------

_FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "multiprocessing"}
_FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def test_no_module_unpickles_or_evaluates_anything():
    """Nor uses multiprocessing, whose resource tracker unlinks other people's segments."""
    sources = sorted(SOURCES.rglob("*.py"))
    assert len(sources) > 30
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & _FORBIDDEN, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in _FORBIDDEN_CALLS, f"{path}:{node.lineno}"
    for path in SOURCES.glob("*.pyx"):
        assert not re.search(
            r"^\s*c?(import|from)\s+(pickle|marshal|multiprocessing)\b", path.read_text(), re.MULTILINE
        )


@pytest.mark.parametrize(
    "meta",
    [
        msgpack.packb({"x": msgpack.ExtType(5, b"cos\nsystem\n(S'true'\ntR.")}),
        b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
        msgpack.packb([1, 2]),
    ],
    ids=["extension type", "a pickle", "no mapping"],
)
def test_meta_is_a_plain_mapping_or_an_error(meta):
    with reader() as end:
        end.put(raw(meta=meta).pack())
        with pytest.raises(MetaError):
            _ = end.read().meta


# --- no resource tracker ----------------------------------------------------------------------------------------

_ATTACHES_AND_ENDS = """
import sys
import tsqp
ring = tsqp.ShmRingBuffer({0}, {1}, {2!r}, {3!r})
own = tsqp.ShmRingBuffer(4096, 4)
from multiprocessing import resource_tracker
assert resource_tracker._resource_tracker._pid is None
"""


def test_a_process_that_only_attached_takes_nothing_with_it():
    """Python's own shared memory starts a process that unlinks a segment when the first who attached ends."""
    with ShmRingBuffer(4096, 4) as ring:
        script = _ATTACHES_AND_ENDS.format(*ring.handle())
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert Path(os.environ["TSQP_SHM_DIR"], ring.name).exists()


# --- ZeroMQ's own ways to wait for ever -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ring", "ring-tiled", "zmq-ipc", "zmq-tcp"])
def test_a_client_closes_in_time_with_messages_its_server_never_took(name, endpoint, start_peer):
    carrier = CARRIERS[name]
    server = start_peer(peers.channel_end, "server", carrier.endpoint(endpoint), carrier.listen_options)
    assert server.hear() == "made"
    client = tsqp.connect(server.ask("endpoint"), PATIENCE_S, **carrier.connect_options)
    server.ask("accept")
    server.stop()
    for number in range(3):
        try:
            client.send([numbered(number, 20 * LARGE)], request_id=number, timeout=0.1, transfer=True)
        except TimeoutError:
            break
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 5
    server.go_on()
    server.ask("close")


# --- Gramine ----------------------------------------------------------------------------------------------------


def test_ipc_from_inside_gramine_is_refused_with_the_reason(endpoint, monkeypatch):
    monkeypatch.setenv("TSQP_ENCLAVE", "gramine")
    for use in (tsqp.listen, tsqp.connect):
        with pytest.raises(EndpointError, match=r"never reaches the host from inside Gramine; use tcp://127\.0\.0\.1"):
            use(endpoint)
    with pytest.raises(EndpointError, match="needs a futex, which never crosses"):
        tsqp.connect("tcp://127.0.0.1:9", wait="block")


def test_nothing_is_listened_on_and_no_segment_made_inside_gramine(shm_directory, monkeypatch):
    """libzmq would abort the process, and space for a segment can't be reserved there."""
    with ShmRingBuffer(4096, 2) as ring:
        monkeypatch.setenv("TSQP_ENCLAVE", "gramine")
        for use in (tsqp.listen, check_endpoint, lambda endpoint: tsqp.listen(endpoint, shm=False)):
            with pytest.raises(EndpointError, match=r"nothing can listen .* inside Gramine: libzmq aborts"):
                use("tcp://127.0.0.1:0")
        with pytest.raises(SegmentError, match="have the process on the host make it"):
            ShmRingBuffer(4096, 2)
        with pytest.raises(EndpointError, match="needs a futex"):
            ShmRingBuffer(*ring.handle(), wait="block")
        assert len(os.listdir(shm_directory)) == 1


@pytest.mark.parametrize("value", ["sgx", "Gramine", "1"])
def test_an_unknown_enclave_is_refused(value, monkeypatch):
    monkeypatch.setenv("TSQP_ENCLAVE", value)
    for use in (tsqp.connect, tsqp.listen):
        with pytest.raises(ConfigError, match=f"TSQP_ENCLAVE='{value}' is unknown; set it to gramine, or unset it"):
            use("tcp://127.0.0.1:9")


@pytest.mark.parametrize("end", ["close", "kill", "our close"])
@pytest.mark.parametrize("name", [None, "tsqp-fixed"])
def test_the_name_of_an_enclaves_segment_ends_with_the_connection(name, end, start_peer, shm_directory):
    """Whoever still holds the old channel: nothing of it is left, and under a fixed name there is a new file."""

    def files() -> dict[str, int]:
        return {entry.name: entry.inode() for entry in os.scandir(shm_directory)}

    expected = {name} - {None}
    with tsqp.listen("tcp://127.0.0.1:0", 1 << 16, 2, shm_name=name) as listener:
        kept = []
        for _ in range(2):
            peer = start_peer(peers.channel_end, "client", listener.endpoint, {}, env={"TSQP_ENCLAVE": "gramine"})
            kept.append(listener.accept(PATIENCE_S))
            assert peer.hear() == "made"
            assert kept[-1].transport == "shm+tcp"
            before = files()
            assert len(before) == 1
            if end == "our close":
                kept[-1].close()
            elif end == "kill":
                peer.kill()
            if end != "kill":
                peer.ask("close")
            old = set(before.values())
            until(lambda old=old: set(files()) == expected and not old & set(files().values()))
        for channel in kept:
            channel.close()


def test_a_client_that_takes_itself_for_an_enclave_polls_and_is_served(start_peer, shm_directory):
    """Over TCP and shared memory; neither end counts on a futex then, and the name of the segment stays."""
    with tsqp.listen("tcp://127.0.0.1:0", **CARRIERS["ring-tcp"].listen_options) as listener:
        inside = {"TSQP_ENCLAVE": "gramine"}
        peer = start_peer(peers.channel_end, "client", listener.endpoint, {}, env=inside)
        with listener.accept(PATIENCE_S) as channel:
            assert peer.hear() == "made"
            assert channel.transport == "shm+tcp"
            assert len(list(shm_directory.iterdir())) == 1
            peer.say(("echo", 20))
            for number in range(20):
                if number % 5 == 0:
                    time.sleep(0.05)  # long enough for both to sleep
                nbytes = LARGE if number % 4 == 0 else 100
                channel.send([numbered(number, nbytes)], request_id=number, timeout=PATIENCE_S)
                assert channel.recv(PATIENCE_S).request_id == number
            assert peer.hear() == 20
            peer.ask("close")
