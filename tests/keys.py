"""Key pairs of a server and its clients, made anew for each test."""

from __future__ import annotations

import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqp.curve import make_keys


@dataclass
class Keys:
    """A server's and a client's key files, another pair that nobody knows, and the directory of clients."""

    directory: Path

    def __post_init__(self) -> None:
        for name in ("server", "client", "other"):
            make_keys(self.directory / "keys", name)
        self.clients.mkdir(mode=0o700)
        self.admit("client")

    @property
    def clients(self) -> Path:
        return self.directory / "clients"

    def public(self, name: str) -> Path:
        return self.directory / "keys" / f"{name}.key"

    def secret(self, name: str) -> Path:
        return self.directory / "keys" / f"{name}.key_secret"

    def secret_text(self, name: str) -> str:
        """The secret key itself, as it stands in the file."""
        (line,) = (line for line in self.secret(name).read_text().splitlines() if "secret-key" in line)
        return line.split('"')[1]

    def admit(self, name: str) -> None:
        """Puts a client's key into the directory, whole."""
        shutil.copy(self.public(name), self.clients / f"{name}.new")
        (self.clients / f"{name}.new").rename(self.clients / f"{name}.key")

    def expel(self, name: str) -> None:
        (self.clients / f"{name}.key").unlink()

    @property
    def listen(self) -> dict[str, Any]:
        return {"curve_key": self.secret("server"), "curve_clients": self.clients}

    @property
    def connect(self) -> dict[str, Any]:
        return self.connect_as("client")

    def connect_as(self, name: str, server: str = "server") -> dict[str, Any]:
        return {"curve_key": self.secret(name), "curve_server": self.public(server)}


def own_address(family: socket.AddressFamily) -> str | None:
    """An address of this machine that is no loopback, None where it has none. Nothing is sent."""
    somewhere = "192.0.2.1" if family == socket.AF_INET else "2001:db8::1"
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((somewhere, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])
