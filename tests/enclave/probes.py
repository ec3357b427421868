"""Tries what Gramine forbids, and says how each attempt ended: run inside the profile, and outside it.

    python probes.py SEGMENT [DIRECTORY] [ONE]     # prints a JSON object: name -> "ok" or the name of an errno

SEGMENT is a file in /dev/shm (inside) or anywhere (outside). System calls are made as such, not through the C library,
wherever that could do without the one that is tried. ONE runs a single probe of :data:`DEADLY`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
#: System call -> its number on x86-64 and on AArch64; 0: there is none.
NUMBERS = {
    "memfd_create": (319, 279),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prctl": (157, 167),
    "inotify_init1": (294, 26),
    "timerfd_create": (283, 85),
    "signalfd4": (289, 74),
    "membarrier": (324, 283),
    "getrusage": (98, 165),
    "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "tkill": (200, 130),
    "sendmmsg": (307, 269),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "fallocate": (285, 47),
    "flock": (73, 32),
    "io_uring_setup": (425, 425),
    "futex": (202, 98),
    "futex_waitv": (449, 449),
    "fork": (57, 0),
    "vfork": (58, 0),
    "clone": (56, 220),
    "execve": (59, 221),
    "execveat": (322, 281),
    "openat2": (437, 437),
    "getdents64": (217, 61),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "sendfile": (40, 71),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
_SIGCHLD = 17
INSIDE = os.path.exists("/dev/attestation")
_FUTEX_WAKE, _PRIVATE = 1, 128


def call(name: str, *arguments: object) -> int:
    """The system call itself; raises ``OSError``."""
    number = NUMBERS[name][0 if X86 else 1]
    if not number:
        raise OSError(errno.ENOSYS, "there is no such system call here")
    done = libc.syscall(ctypes.c_long(number), *arguments)
    if done == -1:
        raise OSError(ctypes.get_errno(), name)
    return int(done)


def _exists(name: str, *arguments: object) -> None:
    """Called so that it does nothing: whatever it says, unless that there is no such call."""
    try:
        call(name, *arguments)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise


def _child(pid: int) -> None:
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _shared_futex(segment: int) -> None:
    """Wakes nobody, on a word of the segment."""
    memory = mmap.mmap(segment, 4096)  # closed with the process: an error's frames still point into it
    call("futex", ctypes.byref(ctypes.c_uint32.from_buffer(memory)), _FUTEX_WAKE, 1, None, None, 0)


def _own_futex(flags: int) -> None:
    word = ctypes.c_uint32(0)
    call("futex", ctypes.byref(word), _FUTEX_WAKE | flags, 1, None, None, 0)


def _thread() -> None:
    """Threads start and are joined; the C library's join waits by a futex that is not private."""
    done = threading.Event()
    thread = threading.Thread(target=done.set)
    thread.start()
    thread.join(10)
    assert done.is_set()


def _unix(kind: int) -> None:
    socket.socket(socket.AF_UNIX, kind).close()


def _unix_inside() -> None:
    """A Unix socket that this process itself bound can be connected to."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{directory}/s")
        listening.listen(1)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{directory}/s")


def _unix_host(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)


def _rights() -> None:
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [0])


def _resolve() -> None:
    try:
        socket.getaddrinfo("localhost", 80)
    except socket.gaierror as error:
        raise OSError(errno.EADDRNOTAVAIL, str(error)) from None


def _proc(path: str) -> None:
    with open(path) as file:
        file.read()


def _rename(path: str) -> None:
    os.rename(path, f"{path}-renamed")
    os.rename(f"{path}-renamed", path)


def _rename_from_there(path: str) -> None:
    """The same with a relative path, which says nothing of where it lies."""
    before = os.getcwd()
    os.chdir(os.path.dirname(path))
    try:
        name = os.path.basename(path)
        os.rename(name, f"{name}-renamed")
        os.rename(f"{name}-renamed", name)
    finally:
        os.chdir(before)


def _list(directory: str) -> None:
    os.listdir(directory)


def _as_device(segment: int) -> None:
    """A character device, inside; told as the errno for "not a regular file's kind"."""
    if stat.S_ISCHR(os.fstat(segment).st_mode):
        raise OSError(errno.ENOTBLK, "a character device")


def _stale_size(segment: int) -> None:
    """Its size stays what it was when it was first looked at."""
    before = os.fstat(segment).st_size
    os.ftruncate(segment, before + 4096)
    after = os.fstat(segment).st_size
    os.ftruncate(segment, before)
    if after != before + 4096:
        raise OSError(errno.ESTALE, "the size is stale")


def _lock(segment: int, command: int) -> None:
    import fcntl
    import struct

    for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK):
        fcntl.fcntl(segment, command, struct.pack("hhqqi4x", kind, 0, 0, 1, 0))


def _map_and_write(segment: int) -> None:
    """What works: the segment can be mapped, read and written."""
    with mmap.mmap(segment, 4096) as memory:
        memory[64] = 7
        assert memory[64] == 7


def _read_duplicate(segment: int) -> None:
    copy = os.dup(segment)
    try:
        os.read(copy, 1)
    finally:
        os.close(copy)


def _zero_map(segment: int) -> None:
    """``mmap`` of length 0, which the mmap module would fill in from the size."""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    if libc.mmap(None, 0, 3, 1, segment, 0) == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")


def _create(directory: str) -> None:
    """A file can be made and removed; its space can't be reserved."""
    path = os.path.join(directory, "tsqp-probe")
    made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    os.close(made)


def _getpid() -> None:
    if os.getpid() == 1:
        raise OSError(errno.EEXIST, "process 1")


def _host_pids() -> None:
    if [name for name in os.listdir("/proc") if name.isdigit()] == [str(os.getpid())]:
        raise OSError(errno.ESRCH, "nobody else")


def _attestation() -> None:
    if not INSIDE:
        raise OSError(errno.ENOENT, "not inside")


def probes(segment_path: str, host_socket: str) -> dict[str, Callable[[], object]]:
    """All probes that the process survives."""
    directory = os.path.dirname(segment_path)
    segment = os.open(segment_path, os.O_RDWR)
    listing = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    zero = ctypes.c_char_p(b"")
    argv = (ctypes.c_char_p * 2)(b"/bin/true", None)
    return {
        "map the segment and write": lambda: _map_and_write(segment),
        "create and unlink": lambda: _create(directory),
        "mmap of length 0": lambda: _zero_map(segment),
        "fstat kind": lambda: _as_device(segment),
        "fstat size": lambda: _stale_size(segment),
        "read": lambda: os.read(segment, 1),
        "write": lambda: os.write(segment, b"x"),
        "pread": lambda: os.pread(segment, 1, 0),
        "pwrite": lambda: os.pwrite(segment, b"x", 0),
        "lseek": lambda: os.lseek(segment, 0, 0),
        "readv": lambda: os.readv(segment, [bytearray(1)]),
        "writev": lambda: os.writev(segment, [b"x"]),
        "preadv": lambda: os.preadv(segment, [bytearray(1)], 0),
        "pwritev": lambda: os.pwritev(segment, [b"x"], 0),
        "copy_file_range": lambda: os.copy_file_range(segment, segment, 1, 0, 4096),
        "sendfile": lambda: call("sendfile", segment, segment, None, 0),
        "read of a duplicate": lambda: _read_duplicate(segment),
        "posix_fallocate on the segment": lambda: os.posix_fallocate(segment, 0, 4096),
        "flock": lambda: call("flock", segment, 8),
        "OFD lock": lambda: _lock(segment, 37),
        "POSIX lock": lambda: _lock(segment, 6),
        "rename": lambda: _rename(segment_path),
        "rename with a relative path": lambda: _rename_from_there(segment_path),
        "link": lambda: (os.link(segment_path, f"{segment_path}-2"), os.unlink(f"{segment_path}-2")),
        "listdir": lambda: _list(directory),
        "getdents64": lambda: call("getdents64", listing, ctypes.create_string_buffer(4096), 4096),
        "openat2": lambda: os.close(
            call("openat2", -100, segment_path.encode(), (ctypes.c_uint64 * 3)(), ctypes.c_size_t(24))
        ),
        "shared futex on the segment": lambda: _shared_futex(segment),
        "shared futex within the process": lambda: _own_futex(0),
        "private futex": lambda: _own_futex(_PRIVATE),
        "thread": _thread,
        "memfd_create": lambda: os.close(call("memfd_create", zero, 0)),
        "pidfd_open": lambda: os.close(call("pidfd_open", os.getpid(), 0)),
        "prctl": lambda: call("prctl", 3, 0, 0, 0, 0),
        "inotify": lambda: os.close(call("inotify_init1", 0)),
        "timerfd": lambda: os.close(call("timerfd_create", 1, 0)),
        "signalfd": lambda: os.close(call("signalfd4", -1, ctypes.byref(ctypes.c_uint64(0)), 8, 0)),
        "membarrier": lambda: call("membarrier", 0, 0, 0),
        "getrusage": lambda: call("getrusage", 0, ctypes.create_string_buffer(256)),
        "pidfd_send_signal": lambda: _exists("pidfd_send_signal", -1, 0, None, 0),
        "pidfd_getfd": lambda: _exists("pidfd_getfd", -1, 0, 0),
        "process_vm_readv": lambda: _exists("process_vm_readv", os.getpid(), None, 0, None, 0, 0),
        "process_vm_writev": lambda: _exists("process_vm_writev", os.getpid(), None, 0, None, 0, 0),
        "ptrace": lambda: _exists("ptrace", 0xFFFF, os.getpid(), None, None),
        "tkill": lambda: _exists("tkill", 0, 0),
        "sendmmsg": lambda: _exists("sendmmsg", -1, None, 0, 0),
        # A kernel may be without these: tried inside only.
        "shmget": lambda: INSIDE and call("shmget", 0x74737170, 0, 0),
        "semget": lambda: INSIDE and call("semget", 0x74737170, 0, 0),
        "msgget": lambda: INSIDE and call("msgget", 0x74737170, 0, 0),
        "io_uring": lambda: INSIDE and call("io_uring_setup", 0, None),
        "fallocate elsewhere": _fallocate,
        "futex_waitv": lambda: _exists("futex_waitv", None, 0, 0, None, 0),
        "fork": lambda: _child(os.fork()),
        "raw fork": lambda: _child(call("fork")) if X86 else _child(call("clone", _SIGCHLD, None, None, None, None)),
        "raw clone": lambda: _child(call("clone", _SIGCHLD, None, None, None, None)),
        # Where it is allowed it would use up this program's stack.
        "raw vfork": lambda: INSIDE and (call("vfork") if X86 else call("clone", _SIGCHLD, None, None, None, None)),
        "posix_spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "execve": lambda: _execute(lambda: call("execve", b"/bin/true", argv, None)),
        "execveat": lambda: _execute(lambda: call("execveat", -100, b"/bin/true", argv, None, 0)),
        "Unix datagram socket": lambda: _unix(socket.SOCK_DGRAM),
        "Unix stream socket inside": _unix_inside,
        "Unix socket of the host": lambda: _unix_host(host_socket),
        "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        "SCM_RIGHTS": _rights,
        "names": _resolve,
        "getpid": _getpid,
        "processes in /proc": _host_pids,
        "/proc/uptime": lambda: _proc("/proc/uptime"),
        "boot_id": lambda: _proc("/proc/sys/kernel/random/boot_id"),
        "/proc/self/maps": lambda: _proc("/proc/self/maps"),
        "kill itself with signal 0": lambda: os.kill(os.getpid(), 0),
        "recognises Gramine": _attestation,
    }


def _fallocate() -> None:
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        call("fallocate", file.fileno(), 0, ctypes.c_long(0), ctypes.c_long(4096))


def _execute(run: Callable[[], int]) -> None:
    """In a child where there may be one, else here."""
    try:
        pid = os.fork()
    except OSError:
        run()  # refused, or this program is gone and its output with it
        return
    if pid == 0:
        try:
            run()
        finally:
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def _bind_libzmq() -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind("tcp://127.0.0.1:*")


def _probe_parent(how: Callable[[int], object]) -> None:
    """Somebody else's process id: outside the parent's, inside any."""
    how(os.getppid() or 2)


def _queue(name: str, *pids: int) -> None:
    """Signal 0 with information of a kind that only the kernel may send to others: EPERM, where one may ask."""
    try:
        call(name, *pids, 0, ctypes.create_string_buffer(128))
    except OSError as error:
        if error.errno != errno.EPERM:
            raise


#: What a process inside does not survive.
DEADLY: dict[str, Callable[[], object]] = {
    "kill": lambda: _probe_parent(lambda pid: os.kill(pid, 0)),
    "raw kill": lambda: _probe_parent(lambda pid: call("kill", pid, 0)),
    "tgkill": lambda: _probe_parent(lambda pid: call("tgkill", pid, pid, 0)),
    "prlimit": lambda: _probe_parent(lambda pid: call("prlimit64", pid, 7, None, None)),
    "getpgid": lambda: _probe_parent(os.getpgid),
    "getsid": lambda: _probe_parent(os.getsid),
    "rt_sigqueueinfo": lambda: _probe_parent(lambda pid: _queue("rt_sigqueueinfo", pid)),
    "rt_tgsigqueueinfo": lambda: _probe_parent(lambda pid: _queue("rt_tgsigqueueinfo", pid, pid)),
    "libzmq bind": _bind_libzmq,
}


def outcome(probe: Callable[[], object]) -> str:
    """ "ok", or the name of the errno that it failed with."""
    try:
        probe()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return "ok"


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if sys.argv[1] == "deadly":
        print(json.dumps({sys.argv[2]: outcome(DEADLY[sys.argv[2]])}))
        return
    print(json.dumps({name: outcome(probe) for name, probe in probes(sys.argv[1], sys.argv[2]).items()}))


if __name__ == "__main__":
    main()
