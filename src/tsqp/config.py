"""Defaults, their environment variables, and what an endpoint string means."""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, EndpointError

MAX_CHUNK_BYTES = 10 << 20
MAX_CHUNKS = 10
#: ``sun_path`` holds 108 bytes with its terminating zero.
MAX_IPC_PATH_BYTES = 107
#: Where key files may be named instead of in an argument.
CURVE_VARIABLES = {
    "curve_key": "TSQP_CURVE_KEY",
    "curve_server": "TSQP_CURVE_SERVER",
    "curve_clients": "TSQP_CURVE_CLIENTS",
}
WAITS = ("auto", "spin", "block", "poll")


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None or text == "":
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} is not a whole number; set one or unset it") from None


def max_chunk_bytes() -> int:
    """Slot size in bytes: ``TSQP_MAX_SHM_CHUNK_BYTES`` or 10 MiB."""
    return _env_int("TSQP_MAX_SHM_CHUNK_BYTES", MAX_CHUNK_BYTES)


def max_chunks() -> int:
    """Slots per ring: ``TSQP_SHM_MAX_CHUNKS`` or 10."""
    return _env_int("TSQP_SHM_MAX_CHUNKS", MAX_CHUNKS)


def threads() -> int | None:
    """``TSQP_THREADS``: how many threads the trusted operators use; None where it is not set."""
    count = _env_int("TSQP_THREADS", 0)
    if count < 0:
        raise ConfigError(f"TSQP_THREADS={count} is negative; set the number of threads of the trusted operators")
    return count or None


def model_path() -> str | None:
    """``LLAMA_MODEL_PATH``, if set."""
    return os.environ.get("LLAMA_MODEL_PATH") or None


def trusted_digest() -> str | None:
    """``TSQP_TRUSTED_DIGEST``, if set: the digest of the file of trusted weights."""
    return os.environ.get("TSQP_TRUSTED_DIGEST") or None


def device() -> str:
    """``LLAMA_GPU_DEVICE``, else the first CUDA device, else the CPU."""
    text = os.environ.get("LLAMA_GPU_DEVICE")
    if text:
        return text
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def dtype() -> str:
    """``LLAMA_DTYPE`` (``float32``, ``bfloat16`` or ``float16``), else ``auto``: the checkpoint's own."""
    return os.environ.get("LLAMA_DTYPE") or "auto"


def socket_directory() -> Path:
    """The directory of default sockets; private to this user (mode 0700) once :func:`default_endpoint` made it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "tsqp"
    return Path(tempfile.gettempdir()) / f"tsqp-{os.geteuid()}"


def default_endpoint() -> str:
    """``LLAMA_IPC_PATH`` (a path or a whole endpoint), else a socket in :func:`socket_directory`."""
    text = os.environ.get("LLAMA_IPC_PATH")
    if text:
        return text if "://" in text else f"ipc://{text}"
    return f"ipc://{socket_directory() / 'server.sock'}"


@contextmanager
def without_keys() -> Iterator[None]:
    """Inside the block the environment names no keys: for connections of a command to its own child processes."""
    names = CURVE_VARIABLES.values()
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@dataclass(frozen=True)
class Endpoint:
    """A parsed endpoint: ``scheme`` is ``ipc`` or ``tcp``; ``path`` or ``host`` and ``port`` are set."""

    text: str
    scheme: str
    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def is_loopback(self) -> bool:
        """True where both ends are on this host by the endpoint's own word."""
        if self.scheme == "ipc":
            return True
        return ipaddress.ip_address(self.host.strip("[]")).is_loopback


def parse_endpoint(text: str) -> Endpoint:
    """Parses ``ipc:///path`` or ``tcp://a.b.c.d:port``.

    Raises :class:`EndpointError` for anything else: host names are refused because they do not resolve inside
    Gramine, paths over 107 bytes because a socket address can't hold them.
    """
    scheme, sep, rest = str(text).partition("://")
    if not sep or scheme not in ("ipc", "tcp") or not rest:
        raise EndpointError(f"endpoint {text!r} is neither ipc:///path nor tcp://address:port; give one of these")
    if scheme == "ipc":
        return _parse_ipc(str(text), rest)
    return _parse_tcp(str(text), rest)


def _parse_ipc(text: str, path: str) -> Endpoint:
    if not path.startswith("/"):
        raise EndpointError(f"endpoint {text!r} has a relative path; give an absolute one, as in ipc:///tmp/a.sock")
    nbytes = len(os.fsencode(path))
    if nbytes > MAX_IPC_PATH_BYTES:
        raise EndpointError(
            f"the socket path of {text!r} has {nbytes} bytes but a socket address holds {MAX_IPC_PATH_BYTES}; "
            "use a shorter path, for example in /tmp or $XDG_RUNTIME_DIR"
        )
    return Endpoint(text, "ipc", path=path)


def _parse_tcp(text: str, rest: str) -> Endpoint:
    host, sep, port_text = rest.rpartition(":")
    if not sep or not port_text.isdigit() or not 0 <= int(port_text) <= 65535:
        raise EndpointError(f"endpoint {text!r} has no port between 0 and 65535; write tcp://127.0.0.1:5555")
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise EndpointError(
            f"endpoint {text!r} names a host; give a numeric address such as 127.0.0.1 "
            "(names do not resolve inside an enclave)"
        ) from None
    return Endpoint(text, "tcp", host=host, port=int(port_text))
