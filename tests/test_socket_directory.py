"""Directories of sockets: made private, never somebody else's; what is in the way is told."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest
from carriers import CARRIERS
from ends import path_of
from users import as_nobody, needs_root

from tsqp.config import default_endpoint, parse_endpoint, socket_directory
from tsqp.errors import EndpointError
from tsqp.serving import make_default_directory

OPTIONS = {**CARRIERS["zmq-ipc"].listen_options}

pytest_plugins = ["user_fixtures"]


# --- the directory of default sockets -----------------------------------------------------------------------------


@pytest.fixture
def default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default socket's directory would be; it is not there yet."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert socket_directory().parent == tmp_path
    return socket_directory()


def test_the_default_directory_is_made_private(default_directory):
    before = os.umask(0)
    try:
        make_default_directory(parse_endpoint(default_endpoint()))
    finally:
        os.umask(before)
    assert default_directory.stat().st_mode & 0o777 == 0o700
    make_default_directory(parse_endpoint(default_endpoint()))  # and may be there


@pytest.mark.parametrize("what", ["open", "link", "link to nowhere", "file", "another user's"])
def test_a_default_directory_that_somebody_else_made_is_refused(default_directory, tmp_path, what):
    if what == "open":
        default_directory.mkdir()
        default_directory.chmod(0o755)
    elif what == "file":
        default_directory.touch()
    elif what == "another user's":
        if os.geteuid() != 0:
            pytest.skip("only root can give a directory away")
        default_directory.mkdir(mode=0o700)
        os.chown(default_directory, 65534, 65534)
    else:
        if what == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
        default_directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EndpointError, match=r"remove it or name another endpoint"):
        make_default_directory(parse_endpoint(default_endpoint()))


# --- what can't be removed or looked at ---------------------------------------------------------------------------


@needs_root
def test_a_stale_socket_that_cannot_be_removed_is_told(endpoint, open_directory, start_peer):
    path = path_of(endpoint)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    path.chmod(0o666)
    open_directory.chmod(0o755)
    with pytest.raises(
        EndpointError, match=rf"in the way at {path} and can't be removed: Permission denied; remove it"
    ):
        as_nobody(start_peer, "listen", endpoint, **OPTIONS)
    path.unlink()


@needs_root
def test_a_socket_that_cannot_be_looked_at_is_told(endpoint, open_directory, start_peer):
    open_directory.chmod(0o700)
    with pytest.raises(EndpointError, match=r"can't be used: Permission denied; choose another endpoint"):
        as_nobody(start_peer, "listen", endpoint, **OPTIONS)
