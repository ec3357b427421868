"""Key files: how they are made, and which ones are refused."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import zmq
import zmq.auth
from keys import Keys

import tsqp
from tsqp import config, curve
from tsqp.errors import ConfigError, KeyFileError


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- making them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_keys_are_made_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        public, secret = curve.make_keys(tmp_path / "a" / "keys", "alice")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a" / "keys") == 0o700
    assert (mode_of(secret), mode_of(public)) == (0o600, 0o644)
    assert sorted(path.name for path in public.parent.iterdir()) == ["alice.key", "alice.key_secret"]
    assert curve.read_secret(secret) == zmq.auth.load_certificate(secret)
    assert curve.read_public(public) == curve.read_secret(secret)[0]


@pytest.mark.parametrize("there", ["alice.key", "alice.key_secret"])
def test_nothing_is_overwritten(tmp_path, there):
    tmp_path.chmod(0o700)
    (tmp_path / there).write_text("precious")
    with pytest.raises(KeyFileError, match=f"{there} exists; nothing was changed"):
        curve.make_keys(tmp_path, "alice")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", ".hidden", "a b", "ä", "x" * 101])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="can't be named"):
        curve.make_keys(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


def test_a_directory_that_others_can_enter_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(KeyFileError, match="not a directory of mode 0700 that belongs to you"):
        curve.make_keys(tmp_path, "alice")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for place in ("link", "file", "file/below"):
        with pytest.raises(KeyFileError):
            curve.make_keys(tmp_path / place, "alice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


# --- a secret key -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o610, 0o601, 0o660])
def test_a_secret_that_others_can_reach_is_refused_at_both_ends(keys, endpoint, mode):
    for name in ("server", "client"):
        keys.secret(name).chmod(mode)
    for use, options in ((tsqp.listen, keys.listen), (tsqp.connect, keys.connect)):
        with pytest.raises(KeyFileError, match=rf"has mode {mode:04o}: others can .* run chmod 600") as caught:
            use(endpoint, **options)
        assert not any(keys.secret_text(name) in str(caught.value) for name in ("server", "client"))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_secret_that_only_its_owner_can_reach_will_do(keys, mode):
    keys.secret("client").chmod(mode)
    assert curve.client_keys(**keys.connect) is not None


def _missing(path: Path) -> None:
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _huge(path: Path) -> None:
    os.truncate(path, 1 << 17)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _garbage(path: Path) -> None:
    path.write_bytes(b'public-key = "\xff\xfe"\nsecret-key = \'' + bytes(range(32)) + b"'\n")


def _short(path: Path) -> None:
    path.write_text(path.read_text().replace('public-key = "', 'public-key = "x'))


def _no_z85(path: Path) -> None:
    path.write_text(f'public-key = "{"~" * 40}"\n')


@pytest.mark.parametrize("damage", [_missing, _directory, _pipe, _huge, _empty, _garbage, _short, _no_z85])
@pytest.mark.parametrize("whose", ["own", "the server's"])
def test_a_file_that_holds_no_key_is_refused(keys, damage, whose):
    damage(keys.secret("client") if whose == "own" else keys.public("server"))
    with pytest.raises(KeyFileError, match=r"can't be read|is no key file|is damaged"):
        curve.client_keys(**keys.connect)


def test_a_public_file_is_no_secret_one_and_the_reverse(keys):
    keys.public("client").chmod(0o600)
    with pytest.raises(KeyFileError, match=r"client\.key holds no secret key; give the \.key_secret file"):
        curve.client_keys(keys.public("client"), keys.public("server"))
    with pytest.raises(KeyFileError, match=r"holds a secret key, which only its owner needs") as caught:
        curve.client_keys(keys.secret("client"), keys.secret("server"))
    assert keys.secret_text("server") not in str(caught.value)


def test_two_halves_of_different_pairs_are_refused(keys):
    text = keys.secret("client").read_text()
    keys.secret("client").write_text(text.replace(keys.secret_text("client"), keys.secret_text("other")))
    with pytest.raises(KeyFileError, match="its two keys do not belong together"):
        curve.client_keys(**keys.connect)


def test_a_pinned_key_that_others_can_change_is_refused(keys):
    keys.public("server").chmod(0o664)
    with pytest.raises(KeyFileError, match=r"has mode 0664: others can change it, .* chmod 644"):
        curve.client_keys(**keys.connect)


# --- the directory of clients' keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_directory_that_others_can_write_is_refused(keys, mode):
    keys.clients.chmod(mode)
    with pytest.raises(
        KeyFileError, match=r"others can change the directory of clients' keys .*, and so let themselves"
    ):
        curve.server_keys(**keys.listen)


def test_a_directory_that_is_none_is_refused(keys):
    for wrong in (keys.directory / "nowhere", keys.public("client")):
        with pytest.raises(KeyFileError, match=r"can't be read|is no directory"):
            curve.server_keys(keys.secret("server"), wrong)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_belongs_to_somebody_else_lets_nobody_in(keys, what, caplog):
    if what == "directory":
        os.chown(keys.clients, 65534, 65534)
        with pytest.raises(KeyFileError, match="it has to be this user's"):
            curve.server_keys(**keys.listen)
        return
    os.chown(keys.clients / "client.key", 65534, 65534)
    assert len(curve.server_keys(**keys.listen).clients) == 0
    assert "belongs to somebody else" in caplog.text


@pytest.mark.parametrize("damage", [_directory, _pipe, _huge, _empty, _garbage, _short, _no_z85])
def test_a_file_that_holds_no_key_is_left_out_and_the_others_count(keys, damage, caplog):
    keys.admit("other")
    damage(keys.clients / "client.key")
    found = curve.server_keys(**keys.listen).clients
    assert len(found) == 1
    assert found.knows(curve.read_public(keys.public("other")))
    assert "a client's key is left out" in caplog.text


def test_a_secret_key_does_not_belong_among_the_clients(keys, caplog):
    (keys.clients / "client.key").write_bytes(keys.secret("client").read_bytes())
    assert len(curve.server_keys(**keys.listen).clients) == 0
    assert "holds a secret key" in caplog.text
    assert keys.secret_text("client") not in caplog.text


def test_files_may_be_links_as_kubernetes_mounts_them(keys):
    (keys.clients / "client.key").unlink()
    (keys.clients / "client.key").symlink_to(keys.public("client"))
    assert curve.server_keys(**keys.listen).clients.knows(curve.read_public(keys.public("client")))


def test_a_key_that_is_replaced_within_a_tick_of_the_clock_is_noticed(keys):
    """Same inode, size and times as at the last look, as on a file system with a coarse clock."""
    path = keys.clients / "client.key"
    other = keys.public("other").read_text()
    before = path.stat()
    clients = curve.server_keys(**keys.listen).clients
    old = curve.read_public(path)
    path.write_text(other.ljust(before.st_size)[: before.st_size])
    real = clients._state
    clients._state = lambda: tuple(
        (name, ino, before.st_mtime_ns, before.st_ctime_ns, before.st_size) for name, ino, *_ in real()
    )
    clients.look(0.0)
    assert not clients.knows(old)


def test_only_what_changes_is_a_new_version(keys):
    clients = curve.server_keys(**keys.listen).clients
    first = clients.version
    (keys.clients / "notes.txt").write_text("not a key")
    clients.look(0.0)
    assert clients.version == first
    keys.expel("client")
    clients.look(60.0)
    assert clients.version == first  # looked a moment ago
    clients.look(0.0)
    assert clients.version != first
    assert len(clients) == 0


@pytest.mark.parametrize("what", ["the directory", "a file"])
def test_keys_are_not_forgotten_for_want_of_descriptors(keys, monkeypatch, what):
    """A flood of connections takes them all; it must not cut off the clients there are."""

    def starve(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    clients = curve.server_keys(**keys.listen).clients
    client, other = (curve.read_public(keys.public(name)) for name in ("client", "other"))
    keys.expel("client")
    keys.admit("other")
    with monkeypatch.context() as starved:
        starved.setattr(*((os, "scandir") if what == "the directory" else (zmq.auth, "load_certificate")), starve)
        clients.look(0.0)
        assert clients.knows(client)
    clients.look(0.0)
    assert not clients.knows(client)
    assert clients.knows(other)


# --- where they are named -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["curve_key", "curve_clients", "curve_server"])
def test_one_half_is_refused(keys, endpoint, missing):
    use, options = (tsqp.connect, keys.connect) if missing == "curve_server" else (tsqp.listen, keys.listen)
    del options[missing]
    with pytest.raises(ConfigError, match=rf"is given without {missing} \(TSQP_\w+\); .* give both or neither"):
        use(endpoint, **options)
    with pytest.raises(ConfigError, match=f"{missing} is empty"):
        use(endpoint, **options, **{missing: ""})


def test_the_environment_names_them_and_an_argument_wins(keys, endpoint, monkeypatch):
    monkeypatch.setenv("TSQP_CURVE_KEY", str(keys.secret("server")))
    monkeypatch.setenv("TSQP_CURVE_CLIENTS", str(keys.clients))
    with tsqp.listen(endpoint, 4096, 2) as listener:
        monkeypatch.delenv("TSQP_CURVE_CLIENTS")
        with pytest.raises(ConfigError, match="TSQP_CURVE_SERVER"):
            tsqp.connect(endpoint, 1.0)
        monkeypatch.setenv("TSQP_CURVE_SERVER", str(keys.public("server")))
        with tsqp.connect(endpoint, 10.0, curve_key=keys.secret("client")), listener.accept(10.0):
            pass
        with config.without_keys():
            assert curve.client_keys() is None
        assert os.environ["TSQP_CURVE_SERVER"] == str(keys.public("server"))


def test_without_curve_in_libzmq_nothing_falls_back_to_plain_text(keys, endpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(zmq, "has", lambda name: False)
    for use, options in ((tsqp.listen, keys.listen), (tsqp.connect, keys.connect)):
        with pytest.raises(ConfigError, match="libzmq was built without CURVE"):
            use(endpoint, **options)
    with pytest.raises(ConfigError, match="built without CURVE"):
        curve.make_keys(tmp_path / "more", "x")
    assert not (tmp_path / "more").exists()
