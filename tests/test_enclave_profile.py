"""The enclave profile itself (tests/enclave): what Gramine forbids fails inside as it was measured there, and outside
it does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import LIMIT_S, short_directory, wait_for
from enclave.harness import HERE, Inside, Started, kill_all, python, require_profile, run_inside

pytestmark = pytest.mark.watchdog(180)
require_profile()

PROBES = str(HERE / "probes.py")
#: Probe -> how it ends inside; the names of errors are those measured in Gramine (docs/gramine.md).
INSIDE = {
    "map the segment and write": "ok",
    "create and unlink": "ok",
    "mmap of length 0": "EINVAL",
    "fstat kind": "ENOTBLK",  # the probe's word for a character device
    "fstat size": "ESTALE",  # and for a size that does not follow
    "read": "EBADF",
    "write": "EBADF",
    "pread": "ESPIPE",
    "pwrite": "ESPIPE",
    "lseek": "ESPIPE",
    "read of a duplicate": "EBADF",
    "readv": "EBADF",
    "writev": "EBADF",
    "preadv": "ESPIPE",
    "pwritev": "ESPIPE",
    "copy_file_range": "EBADF",
    "sendfile": "EBADF",
    "posix_fallocate on the segment": "ENODEV",
    "flock": "ENOSYS",
    "OFD lock": "EINVAL",
    "POSIX lock": "EINVAL",
    "rename": "ENOSYS",
    "rename with a relative path": "ENOSYS",
    "link": "ENOSYS",
    "listdir": "EINVAL",
    "getdents64": "EINVAL",
    "openat2": "ENOSYS",
    "shared futex on the segment": "ENOSYS",
    "shared futex within the process": "ok",
    "private futex": "ok",
    "thread": "ok",
    "memfd_create": "ENOSYS",
    "pidfd_open": "ENOSYS",
    "prctl": "ENOSYS",
    "inotify": "ENOSYS",
    "timerfd": "ENOSYS",
    "signalfd": "ENOSYS",
    "membarrier": "ENOSYS",
    "getrusage": "ENOSYS",
    "pidfd_send_signal": "ENOSYS",
    "pidfd_getfd": "ENOSYS",
    "process_vm_readv": "ENOSYS",
    "process_vm_writev": "ENOSYS",
    "ptrace": "ENOSYS",
    "tkill": "ENOSYS",
    "sendmmsg": "ENOSYS",
    "shmget": "ENOSYS",
    "semget": "ENOSYS",
    "msgget": "ENOSYS",
    "io_uring": "ENOSYS",
    "fallocate elsewhere": "ENOSYS",
    "futex_waitv": "ENOSYS",
    "fork": "EPERM",
    "raw fork": "EPERM",
    "raw clone": "EPERM",
    "raw vfork": "EPERM",
    "posix_spawn": "EPERM",
    "execve": "EPERM",
    "execveat": "EPERM",
    "Unix datagram socket": "ESOCKTNOSUPPORT",
    "Unix stream socket inside": "ok",
    "Unix socket of the host": "ECONNREFUSED",
    "netlink socket": "EAFNOSUPPORT",
    "SCM_RIGHTS": "ENOSYS",
    "names": "EADDRNOTAVAIL",  # the probe's word for a name that does not resolve
    "getpid": "EEXIST",  # and for process 1
    "processes in /proc": "ESRCH",  # and for nobody else there
    "/proc/uptime": "ENOENT",
    "boot_id": "ENOENT",
    "/proc/self/maps": "ok",
    "kill itself with signal 0": "ok",
    "recognises Gramine": "ok",
}
#: What is the same outside.
OUTSIDE = {"mmap of length 0": "EINVAL", "recognises Gramine": "ENOENT"}
#: What a process does not survive inside -> the signals it may end by: the filter's, or an abort (which of process 1
#: the kernel turns into SIGSEGV).
DEADLY = {
    "kill": (signal.SIGSYS,),
    "raw kill": (signal.SIGSYS,),
    "tgkill": (signal.SIGSYS,),
    "prlimit": (signal.SIGSYS,),
    "getpgid": (signal.SIGSYS,),
    "getsid": (signal.SIGSYS,),
    "rt_sigqueueinfo": (signal.SIGSYS,),
    "rt_tgsigqueueinfo": (signal.SIGSYS,),
    "libzmq bind": (signal.SIGABRT, signal.SIGSEGV),
}


@pytest.fixture(autouse=True)
def _programs_end_with_their_test() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture(scope="module")
def host_socket() -> Iterator[str]:
    """A Unix socket of the host, at a path that is seen inside, too."""
    with short_directory() as directory:
        path = str(directory / "s")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path)
            listening.listen(8)
            yield path


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two pages in a directory that is to be /dev/shm."""
    with open(tmp_path_factory.mktemp("shm") / "tsqp-probed", "wb") as file:
        file.truncate(8192)
    return Path(file.name)


@pytest.fixture(scope="module")
def inside(segment: Path, host_socket: str) -> dict[str, str]:
    keep = [Path(host_socket).parent]
    ended = run_inside(python(PROBES, f"/dev/shm/{segment.name}", host_socket), segment.parent, keep=keep)
    assert ended.code == 0, ended
    return json.loads(ended.out)


@pytest.fixture(scope="module")
def outside(segment: Path, host_socket: str) -> dict[str, str]:
    return json.loads(run_outside(str(segment), host_socket))


def run_outside(*arguments: str) -> str:
    done = subprocess.run(
        python(PROBES, *arguments), capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=HERE
    )
    assert done.returncode == 0, done
    return done.stdout


def test_every_probe_has_an_expectation(inside: dict[str, str], outside: dict[str, str]) -> None:
    assert set(inside) == set(outside) == set(INSIDE)


@pytest.mark.parametrize("probe", INSIDE)
def test_rule(probe: str, inside: dict[str, str], outside: dict[str, str]) -> None:
    assert (inside[probe], outside[probe]) == (INSIDE[probe], OUTSIDE.get(probe, "ok"))


@pytest.mark.parametrize("probe", DEADLY)
def test_deadly_rule(probe: str, tmp_path: Path) -> None:
    ended = run_inside(python(PROBES, "deadly", probe), tmp_path)
    assert ended.out == ""
    assert ended.signal in DEADLY[probe], ended
    assert ended.code == 128 + ended.signal
    assert json.loads(run_outside("deadly", probe)) == {probe: "ok"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["the launcher", "the program"])
def test_signals_of_the_host_are_ignored(number: int, whom: str, tmp_path: Path) -> None:
    started = Started(python("-c", "import time; time.sleep(2); print('alive')"), tmp_path)
    wait_for(lambda: started.pid, "the start inside")
    os.kill(started.process.pid if whom == "the launcher" else started.pid, number)
    assert started.finish() == Inside(0, "alive\n", "", {})


@pytest.mark.parametrize("whom", ["the launcher", "the program"])
def test_a_kill_ends_both(whom: str, tmp_path: Path) -> None:
    started = Started(python("-c", "import time; time.sleep(600)"), tmp_path)
    wait_for(lambda: started.pid, "the start inside")
    pid = started.pid
    os.kill(started.process.pid if whom == "the launcher" else pid, signal.SIGKILL)
    ended = started.finish()
    assert ended.code == (-signal.SIGKILL if whom == "the launcher" else 128 + signal.SIGKILL)
    wait_for(lambda: not Path("/proc", str(pid)).exists(), "the end of the program inside")


def test_the_host_is_as_it_was(tmp_path: Path) -> None:
    """Mounts are private, and what is made in /tmp inside is not seen."""
    before = Path("/proc/self/mounts").read_text()
    made = "import os, pathlib; pathlib.Path('/tmp/tsqp-made-inside').touch(); print(sorted(os.listdir('/tmp')))"
    ended = run_inside(python("-c", made), tmp_path)
    assert ended.code == 0, ended
    assert "tsqp-made-inside" in ended.out
    assert not Path("/tmp/tsqp-made-inside").exists()
    assert Path("/proc/self/mounts").read_text() == before


def test_status_and_output_come_out(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    assert run_inside(python("-c", code), tmp_path) == Inside(7, "out\n", "err\n", {})


def test_refusals_are_counted(tmp_path: Path) -> None:
    code = "import os, contextlib\nfor _ in range(3):\n with contextlib.suppress(OSError): os.memfd_create('x')"
    assert run_inside([sys.executable, "-c", code], tmp_path).refused == {"memfd_create": 3}
