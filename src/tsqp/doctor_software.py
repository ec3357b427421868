"""Checks of software: packages, torch and its devices, libzmq, sockets, descriptors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import tempfile

from . import config
from .doctor_machine import NOTE, OK, PROBLEM, Finding, Machine
from .errors import EndpointError

_FEW_DESCRIPTORS = 256
#: A longer directory might not leave room for the socket's name in a socket address.
_MAX_DIRECTORY_BYTES = 70


def packages(machine: Machine) -> Finding:
    """Whether what tsqp needs is installed, in versions it works with."""
    from packaging.requirements import Requirement

    versions: dict[str, str | None] = {"python": platform.python_version()}
    wrong = []
    for text in importlib.metadata.requires("tsqp") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            versions[needed.name] = None
            wrong.append((f"{needed.name} is missing", str(needed)))
            continue
        versions[needed.name] = version
        if not needed.specifier.contains(version, prereleases=True):
            wrong.append((f"{needed.name} {version} does not meet {needed.specifier}", str(needed)))
    if wrong:
        advice = "pip install " + " ".join(f"'{needed}'" for _, needed in wrong)
        return Finding("packages", PROBLEM, "; ".join(text for text, _ in wrong) + ".", advice, versions)
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("packages", OK, f"{told}.", figures=versions)


def torch_build(machine: Machine) -> Finding:
    """What torch was built for, and whether that is here."""
    import torch

    cuda, onednn = torch.version.cuda, torch.backends.mkldnn.is_available()
    works = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if works else []
    gpu = machine.first("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")
    figures = {
        "version": torch.__version__,
        "cuda_build": cuda,
        "cuda_available": works,
        "devices": devices,
        "onednn": onednn,
        "gpu_seen": gpu or None,
    }
    told = f"torch {torch.__version__}, {'for CUDA ' + cuda if cuda else 'a CPU build'}"
    if works:
        return Finding("torch", OK, f"{told}; devices: {', '.join(devices)}.", figures=figures)
    if gpu and cuda:
        advice = "Look at nvidia-smi: the driver may be older than this CUDA, or CUDA_VISIBLE_DEVICES hides the device."
        return Finding("torch", PROBLEM, f"{told}, sees no GPU although there is {gpu}.", advice, figures)
    if gpu:
        advice = "On the server's machine install a CUDA build: pip install torch (see pytorch.org)."
        return Finding("torch", NOTE, f"{told}, although there is a GPU ({gpu}).", advice, figures)
    if not onednn:
        advice = "Use a torch with oneDNN (mkldnn): the wheels of pytorch.org have it."
        return Finding(
            "torch", NOTE, f"{told} without oneDNN: linear modules are computed by torch alone.", advice, figures
        )
    return Finding("torch", OK, f"{told}, with oneDNN; no GPU is here.", figures=figures)


def zeromq(machine: Machine) -> Finding:
    """What libzmq can."""
    import zmq

    can = {name: bool(zmq.has(name)) for name in ("ipc", "curve")}
    figures = {"libzmq": zmq.zmq_version(), "pyzmq": zmq.pyzmq_version(), **can}
    told = f"libzmq {zmq.zmq_version()} under pyzmq {zmq.pyzmq_version()}"
    wheel = "Install pyzmq's own wheel: pip install --force-reinstall --only-binary :all: pyzmq."
    if not can["ipc"]:
        return Finding("zeromq", PROBLEM, f"{told} has no ipc:// transport.", wheel, figures)
    if not can["curve"]:
        return Finding(
            "zeromq", NOTE, f"{told} was built without CURVE: no connection can be encrypted.", wheel, figures
        )
    return Finding("zeromq", OK, f"{told}, with ipc and CURVE.", figures=figures)


def unix_sockets(machine: Machine) -> Finding:
    """Whether sockets of the file system work, and what is at the default endpoint."""
    name = "unix_sockets"
    if machine.in_gramine:
        told = "Inside Gramine no Unix socket reaches the host: ipc:// would connect to nothing, in silence."
        return Finding(name, NOTE, told, "Connect by tcp://127.0.0.1:PORT to a server that listens there.")
    try:
        _try_socket()
    except OSError as error:
        told = f"A Unix socket can't be used in {tempfile.gettempdir()}: {error.strerror or error}."
        return Finding(name, PROBLEM, told, "Set TMPDIR to a directory on a local file system, or use tcp://127.0.0.1.")
    try:
        endpoint = config.parse_endpoint(config.default_endpoint())
    except EndpointError as error:
        return Finding(
            name, PROBLEM, f"The default endpoint can't work: {error}.", "Set LLAMA_IPC_PATH to a short path."
        )
    return _default_endpoint(name, endpoint)


def _default_endpoint(name: str, endpoint: config.Endpoint) -> Finding:
    figures = {"default_endpoint": endpoint.text}
    if endpoint.scheme != "ipc":
        return Finding(name, OK, f"Unix sockets work; the default endpoint is {endpoint.text}.", figures=figures)
    directory = os.path.dirname(endpoint.path)
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(directory)
        if found.st_uid != os.geteuid() and not os.access(directory, os.W_OK):
            told = f"{directory}, where the default endpoint lies, belongs to somebody else."
            return Finding(name, PROBLEM, told, "Set LLAMA_IPC_PATH to a path in a directory of your own.", figures)
    if not os.path.exists(endpoint.path):
        return Finding(name, OK, f"Unix sockets work; no server is at {endpoint.text}.", figures=figures)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(endpoint.path)
        except ConnectionRefusedError:
            told = f"Unix sockets work; {endpoint.path} was left by a server that was killed."
            return Finding(name, NOTE, told, "Nothing needs doing: the next server takes its place.", figures)
        except OSError as error:
            told = f"The socket at {endpoint.path} can't be used: {error.strerror or error}."
            return Finding(name, PROBLEM, told, "Run both ends as one user, or set LLAMA_IPC_PATH.", figures)
    return Finding(name, OK, f"Unix sockets work; something listens at {endpoint.text}.", figures=figures)


def short_directory() -> str:
    """A new private directory whose path leaves room for a socket's name."""
    parent = tempfile.gettempdir()
    short = len(os.fsencode(parent)) <= _MAX_DIRECTORY_BYTES
    return tempfile.mkdtemp(prefix="tsqp-doctor-", dir=parent if short else "/tmp")


def _try_socket() -> None:
    directory = short_directory()
    try:
        with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
            for end in (listening, client):
                end.settimeout(2.0)
            listening.bind(f"{directory}/s")
            listening.listen(1)
            client.connect(f"{directory}/s")
            client.sendall(b"x")
            with listening.accept()[0] as accepted:
                accepted.settimeout(2.0)
                if accepted.recv(1) != b"x":
                    raise OSError("what was sent did not arrive")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def descriptors(machine: Machine) -> Finding:
    """Whether a server can have as many files open as its clients need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    figures = {"soft": soft, "hard": hard}
    if 0 <= soft < _FEW_DESCRIPTORS:
        told = f"A process here may have {soft} files open, which is few for a server."
        return Finding("descriptors", NOTE, told, "ulimit -n 4096 (docker: --ulimit nofile=4096).", figures)
    return Finding("descriptors", OK, f"A process here may have {soft} files open.", figures=figures)
