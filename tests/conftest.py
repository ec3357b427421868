"""What every test gets: a watchdog, a check that nothing is left behind, a short endpoint, processes to talk to.

Segments live in a directory of this run's own (``TSQP_SHM_DIR``, on the same file system as the real one), so
that what another run on the machine creates is never counted, judged or removed.
"""

from __future__ import annotations

import os

# Before torch loads: OpenMP workers that spin after each parallel region starve the peer process.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import faulthandler
import gc
import itertools
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peers as peers_module
import pytest
import torch
import zmq.utils.garbage
from carriers import Background, Carrier, Pair, pair_over

import tsqp
from tsqp.listener import Listener
from tsqp.transport import Channel

# A shell ignores SIGINT for its background jobs and children inherit that: Ctrl-C must reach the tests' processes.
signal.signal(signal.SIGINT, signal.default_int_handler)

WATCHDOG_S = 60.0
#: How long after the first alarm, which fails the test, the second one ends the whole run.
LAST_RESORT_S = 20.0
#: What ends by itself (a thread that was told to stop) has this long to do so.
SETTLE_S = 5.0
#: Options of the user's own shell must not change what the tests do.
_FOREIGN = ("LLAMA_MODEL_PATH", "LLAMA_GPU_DEVICE", "LLAMA_DTYPE", "LLAMA_IPC_PATH", "TSQP_ENCLAVE", "TSQP_THREADS")
_FOREIGN += ("TSQP_TRUSTED_DIGEST",)
_FOREIGN += ("TSQP_CURVE_KEY", "TSQP_CURVE_SERVER", "TSQP_CURVE_CLIENTS")
_FOREIGN += ("TSQP_MAX_SHM_CHUNK_BYTES", "TSQP_SHM_MAX_CHUNKS", "TSQP_SHM_NAME", "TSQP_SHM_DIR")
_SCRATCH = "pytest-tsqp-"

_stderr = pytest.StashKey[int]()
_scratch = pytest.StashKey[list[Path]]()
_failed = pytest.StashKey[bool]()
_numbers = itertools.count()

torch.set_num_threads(1)


# --- the run's own directories --------------------------------------------------------------------------------


def _new_scratch(parent: str) -> Path:
    """A 0700 directory whose name tells whose it is; those of runs that were killed are removed."""
    for old in Path(parent).glob(f"{_SCRATCH}*"):
        owner = old.name[len(_SCRATCH) :].partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-", dir=parent))


def pytest_configure(config: pytest.Config) -> None:
    for name in _FOREIGN:
        os.environ.pop(name, None)
    config.stash[_stderr] = os.dup(2)  # output is not captured yet
    shm = _new_scratch("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
    sockets = _new_scratch("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir())
    config.stash[_scratch] = [shm, sockets]
    os.environ["TSQP_SHM_DIR"] = str(shm)
    # Its thread and context live as long as the interpreter; started here, they are in every comparison.
    zmq.utils.garbage.gc.start()


def pytest_unconfigure(config: pytest.Config) -> None:
    for directory in config.stash.get(_scratch, []):
        shutil.rmtree(directory, ignore_errors=True)


# --- watchdog -------------------------------------------------------------------------------------------------


@contextmanager
def _watchdog(item: pytest.Item, phase: str) -> Iterator[None]:
    """Fails a phase of a test that takes longer than its limit, with the stacks of all threads.

    The alarm raises in the main thread. If even that does not end it, faulthandler ends the process.
    """
    marker = item.get_closest_marker("watchdog")
    limit = float(marker.args[0]) if marker else WATCHDOG_S
    stderr = item.config.stash[_stderr]

    def expired(*_: object) -> None:
        os.write(stderr, f"\nwatchdog: {item.nodeid} ({phase}) took longer than {limit:g} s\n".encode())
        faulthandler.dump_traceback(file=stderr, all_threads=True)
        pytest.fail(f"watchdog: {phase} took longer than {limit:g} s; the stacks of all threads are on stderr")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(limit + LAST_RESORT_S, exit=True, file=stderr)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _watchdog(item, "setup"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _watchdog(item, "call"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with _watchdog(item, "teardown"):
        return (yield)


# --- nothing is left behind -----------------------------------------------------------------------------------


def _sockets_in(directory: Path) -> Iterator[str]:
    for root, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(root, name)
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    yield path
            except FileNotFoundError:
                continue


def _is_watched(thread: threading.Thread) -> bool:
    ours = thread.name.startswith("tsqp") or not thread.daemon
    return ours and not isinstance(thread, zmq.utils.garbage.GarbageCollectorThread)


def _read(path: str) -> str:
    """A file of /proc; empty if its process or thread ended meanwhile."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _native_threads() -> int:
    """How many threads libzmq runs in this process: two for each context that lives. One that has just been started has
    no name yet, on a busy machine."""
    end = time.monotonic() + SETTLE_S
    while True:
        names = [_read(f"/proc/self/task/{task}/comm") for task in os.listdir("/proc/self/task")]
        count = sum(name.startswith("ZMQbg") for name in names)
        if count % 2 == 0 or time.monotonic() >= end:
            return count
        time.sleep(0.01)


def _children() -> Iterator[tuple[str, str]]:
    """Child processes, dead ones that nobody waited for included, and those of the fork server."""
    fork_server = peers_module.fork_server_pid()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if not fields or int(fields[1]) not in (os.getpid(), fork_server) or int(pid) == fork_server:
            continue
        command = _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
        if "multiprocessing.resource_tracker" not in command:  # the standard library's; ends with this process
            yield pid, command or "ended, but nobody waited for it"


def _present(shm: Path, directories: list[Path]) -> dict[str, str]:
    """Everything of the kinds a test must not leave behind that is there now: its name, and more about it."""
    found = {f"segment {name}": "" for name in os.listdir(shm) if name.startswith("tsqp")}
    found |= {f"socket {path}": "" for directory in directories for path in _sockets_in(directory)}
    found |= {f"thread {thread.ident}": thread.name for thread in threading.enumerate() if _is_watched(thread)}
    found |= {f"libzmq thread {number}": "" for number in range(_native_threads())}
    found |= {f"process {pid}": command for pid, command in _children()}
    return found


def _remains(look: Callable[[], dict[str, str]], before: dict[str, str]) -> str:
    """What :func:`_present` shows that was not there before, after a moment to end by itself; empty: nothing."""
    end = time.monotonic() + SETTLE_S
    while True:
        left = {name: more for name, more in look().items() if name not in before}
        if not left or time.monotonic() >= end:
            return ", ".join(f"{name} {more}".strip() for name, more in sorted(left.items()))
        gc.collect()  # what hangs only on a cycle (a caught exception's frames) is not left behind
        time.sleep(0.05)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


def pytest_collection_finish() -> None:
    peers_module.set_preload()


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_by_the_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The same check for fixtures of wider scope than one test."""
    shm, sockets = request.config.stash[_scratch]
    directories = [sockets, tmp_path_factory.getbasetemp()]
    before = _present(shm, directories)
    yield
    if request.session.testsfailed == 0:
        left = _remains(lambda: _present(shm, directories), before)
        assert not left, f"the run left behind: {left}"


@pytest.fixture(autouse=True)
def _nothing_left_by_the_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test after which a segment, socket file, thread or process is there that was not before it.

    What fixtures of wider scope hold was there before and is not counted.
    """
    shm, sockets = request.config.stash[_scratch]
    directories = [sockets]
    if "tmp_path" in request.fixturenames:
        directories.append(request.getfixturevalue("tmp_path"))
    before = _present(shm, directories)
    yield
    if not request.node.stash.get(_failed, False):  # a failed test has said enough
        left = _remains(lambda: _present(shm, directories), before)
        assert not left, f"the test left behind: {left}"


# --- what tests use -------------------------------------------------------------------------------------------


@pytest.fixture
def shm_directory(request: pytest.FixtureRequest) -> Path:
    """Where this run's segments lie."""
    return request.config.stash[_scratch][0]


@pytest.fixture
def endpoint(request: pytest.FixtureRequest) -> str:
    """A unique ``ipc://`` endpoint in a private directory; ``tmp_path`` can be too long for a socket address."""
    directory = request.config.stash[_scratch][1] / str(next(_numbers))
    directory.mkdir(mode=0o700)
    return f"ipc://{directory}/s"


@pytest.fixture
def listener(carrier: Carrier, endpoint: str) -> Iterator[Listener]:
    """A listener for the test module's own ``carrier``."""
    with tsqp.listen(carrier.endpoint(endpoint), **carrier.listen_options) as made:
        yield made


@pytest.fixture
def pair(carrier: Carrier, endpoint: str) -> Iterator[Pair]:
    """A client and its server's end over the test module's own ``carrier``."""
    with pair_over(carrier, endpoint) as both:
        yield both


@pytest.fixture(params=["to the server", "to the client"])
def direction(request: pytest.FixtureRequest, pair: Pair) -> tuple[Channel, Channel]:
    """(sender, receiver)"""
    return (pair.client, pair.server) if request.param == "to the server" else (pair.server, pair.client)


@pytest.fixture
def background() -> Iterator[Background]:
    """Threads whose errors are raised at the end of the test."""
    threads = Background()
    yield threads
    threads.join()


@pytest.fixture
def start_peer() -> Iterator[Callable[..., peers_module.Peer]]:
    """``start_peer(function of peers.py, *arguments)`` runs it in a process of its own, killed after the test."""
    started: list[peers_module.Peer] = []

    def start(target: Callable[..., object], *arguments: object, **options: object) -> peers_module.Peer:
        started.append(peers_module.Peer(target, *arguments, **options))
        return started[-1]

    yield start
    for peer in started:
        peer.end()
