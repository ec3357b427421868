"""CURVE keys: encryption and mutual authentication of ZeroMQ connections, by libzmq's CurveZMQ.

Each end has a key pair. A client pins the server's public key; a server lets in the clients whose public keys lie in a
directory. Nothing cryptographic is done here: libzmq makes keys and speaks the protocol (https://rfc.zeromq.org/spec/26),
and key files are those of pyzmq (``zmq.auth``). What goes through the shared-memory ring is not encrypted.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85

from .config import CURVE_VARIABLES, Endpoint
from .errors import ConfigError, DescriptorsExhaustedError, InsecureEndpointError, KeyFileError

log = logging.getLogger("tsqp.keys")

#: What libzmq's questions about clients are marked with. With this enforced, nobody comes in while nobody answers.
ZAP_DOMAIN = b"tsqp"
#: How old the last look at the directory of clients' keys may be.
LOOK_S = 0.25
_KEY_BYTES = 32
_MAX_FILE_BYTES = 1 << 16
#: Says nothing about the keys: a flood of connections must not make a server forget them.
_STARVED = (errno.EMFILE, errno.ENFILE)
#: Longer than a tick of any file system's clock that counts.
_TICK_NS = 100_000_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

#: A file or directory as users name it.
PathLike = str | os.PathLike[str]


def check_support() -> None:
    """Raises :class:`ConfigError` where libzmq was built without CURVE: then there is nothing to fall back to."""
    if not zmq.has("curve"):
        raise ConfigError(
            "this libzmq was built without CURVE, so connections can't be encrypted or authenticated; "
            "install pyzmq from its wheel (pip install --force-reinstall pyzmq)"
        )


def check_reach(endpoint: Endpoint, keys: ServerKeys | ClientKeys | None) -> None:
    """Raises :class:`InsecureEndpointError` for an endpoint beyond this host where this end has no keys."""
    if keys is None and not endpoint.is_loopback:
        raise InsecureEndpointError(
            f"{endpoint.text} reaches beyond this host, where tsqp sends nothing in plain text; make keys "
            "(tsqp keygen) and give each end its own (curve_key) and the other's (curve_server, curve_clients), or use "
            "127.0.0.1 or ipc://"
        )


# --- the two ends ---------------------------------------------------------------------------------------------------


class _OwnKeys:
    """A key pair. The secret key never shows in a ``repr`` or an error."""

    def __init__(self, public: bytes, secret: bytes) -> None:
        self.public = public
        self._secret = secret

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.public.decode()}>"

    def _apply_pair(self, socket: zmq.Socket) -> None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)


class ClientKeys(_OwnKeys):
    """A client's key pair and the public key its server has to have."""

    def __init__(self, public: bytes, secret: bytes, server: bytes) -> None:
        super().__init__(public, secret)
        self._server = server

    def apply(self, socket: zmq.Socket) -> None:
        """Makes every connection of ``socket``, which has none yet, one to that server."""
        self._apply_pair(socket)
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._server)


class ServerKeys(_OwnKeys):
    """A server's key pair and the clients it lets in."""

    def __init__(self, public: bytes, secret: bytes, clients: PublicKeys) -> None:
        super().__init__(public, secret)
        self.clients = clients

    def apply(self, socket: zmq.Socket) -> None:
        """Makes ``socket``, which is not bound yet, refuse whoever its ZAP handler does not know."""
        self._apply_pair(socket)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def client_keys(curve_key: PathLike | None = None, curve_server: PathLike | None = None) -> ClientKeys | None:
    """The keys of a client: its own secret-key file and its server's public-key file; None where neither is given.

    What is not given comes from ``TSQP_CURVE_KEY`` and ``TSQP_CURVE_SERVER``. Raises :class:`ConfigError` for one
    without the other, and :class:`KeyFileError`.
    """
    given = _both(curve_key=curve_key, curve_server=curve_server)
    if given is None:
        return None
    key, server = given
    check_support()
    public, secret = read_secret(key)
    return ClientKeys(public, secret, read_public(server))


def server_keys(curve_key: PathLike | None = None, curve_clients: PathLike | None = None) -> ServerKeys | None:
    """The keys of a server: its own secret-key file and the directory of its clients' public keys; None where neither
    is given.

    What is not given comes from ``TSQP_CURVE_KEY`` and ``TSQP_CURVE_CLIENTS``. Raises :class:`ConfigError` for one
    without the other, and :class:`KeyFileError`.
    """
    given = _both(curve_key=curve_key, curve_clients=curve_clients)
    if given is None:
        return None
    key, clients = given
    check_support()
    public, secret = read_secret(key)
    return ServerKeys(public, secret, PublicKeys(clients))


def _both(**options: PathLike | None) -> tuple[Path, Path] | None:
    """Two paths, from the arguments or the environment; None where there is none of them."""
    found: dict[str, Path] = {}
    for name, value in options.items():
        text = os.environ.get(CURVE_VARIABLES[name]) or None if value is None else os.fspath(value)
        if text == "":
            raise ConfigError(f"{name} is empty; name a file, or leave it out for a connection without keys")
        if text is not None:
            found[name] = Path(text).expanduser()
    if not found:
        return None
    if len(found) < len(options):
        (have,) = found
        (lack,) = set(options) - set(found)
        raise ConfigError(
            f"{have} ({CURVE_VARIABLES[have]}) is given without {lack} ({CURVE_VARIABLES[lack]}); both ends are "
            "authenticated or none: give both or neither"
        )
    first, second = found.values()
    return first, second


# --- key files ------------------------------------------------------------------------------------------------------


def make_keys(directory: PathLike, name: str) -> tuple[Path, Path]:
    """Makes a key pair: ``NAME.key``, public, and ``NAME.key_secret``, in a directory of mode 0700.

    The directory is made where there is none. Nothing is overwritten. Returns the two paths. Raises
    :class:`ConfigError` for a name that can't be a file's and :class:`KeyFileError` for a directory or file in the way.
    """
    check_support()
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a key can't be named {name!r}; use letters, digits, '_', '-' and '.'")
    place = Path(directory).expanduser()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise KeyFileError(
                f"{place} is not a directory of mode 0700 that belongs to you; secret keys need one (chmod 700), or "
                "name another"
            )
        return _write_pair(place, name)
    except FileExistsError as error:
        raise KeyFileError(
            f"{error.filename2 or error.filename} exists; nothing was changed: choose another name"
        ) from None
    except OSError as error:
        raise KeyFileError(f"no keys can be written to {place}: {error.strerror}; choose another directory") from None


def _write_pair(place: Path, name: str) -> tuple[Path, Path]:
    """Writes them aside and links them into place: nothing is ever there in part, too open, or replaced."""
    aside = Path(tempfile.mkdtemp(prefix=".keygen-", dir=place))  # mode 0700: its files are private whatever the umask
    made: list[Path] = []
    try:
        public, secret = map(Path, zmq.auth.create_certificates(aside, name))
        secret.chmod(0o600)
        public.chmod(0o644)
        for path in (secret, public):
            os.link(path, place / path.name)
            made.append(place / path.name)
    except BaseException:
        for path in made:
            path.unlink()
        raise
    finally:
        shutil.rmtree(aside)
    return place / public.name, place / secret.name


def read_secret(path: Path) -> tuple[bytes, bytes]:
    """Public and secret key of a secret-key file. Raises :class:`KeyFileError`, also where others can read it."""
    _check_file(path, 0o077, "others can read or change it, so it is no secret; run chmod 600, or make new keys")
    public, secret = _read(path)
    if secret is None:
        raise KeyFileError(f"{path} holds no secret key; give the .key_secret file of this end")
    if not _is_key(secret) or zmq.curve_public(secret) != public:
        raise KeyFileError(f"{path} is damaged: its two keys do not belong together; make new ones (tsqp keygen)")
    return public, secret


def read_public(path: Path) -> bytes:
    """The public key of a public-key file. Raises :class:`KeyFileError`, also for a file that has a secret key: it
    should not be where somebody else's public key is wanted."""
    _check_file(path, 0o022, "others can change it, so whose key it is can't be told; run chmod 644")
    public, secret = _read(path)
    if secret is not None:
        raise KeyFileError(
            f"{path} holds a secret key, which only its owner needs; give the .key file, without _secret"
        )
    return public


def _check_file(path: Path, forbidden: int, problem: str) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise KeyFileError(f"the key file {path} can't be read: {error.strerror}; make keys with tsqp keygen") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is no key file; give one that tsqp keygen made")
    if found.st_mode & forbidden:
        raise KeyFileError(f"the key file {path} has mode {stat.S_IMODE(found.st_mode):04o}: {problem}")


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        if error.errno in _STARVED:
            raise DescriptorsExhaustedError(
                error.errno, f"the key file {path} can't be opened: no file descriptors are left; close files"
            ) from None
        why = error.strerror or "it is gone"  # pyzmq's own
        raise KeyFileError(f"the key file {path} can't be read: {why}; may this user read it?") from None
    except ValueError:
        raise KeyFileError(f"{path} is no key file; give one that tsqp keygen made") from None
    if not _is_key(public):
        raise KeyFileError(f"{path} is damaged: it holds no valid key; copy it again")
    return public, secret


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == _KEY_BYTES * 5 // 4 and len(z85.decode(text)) == _KEY_BYTES
    except (KeyError, ValueError, struct.error):
        return False


# --- the clients of a server ----------------------------------------------------------------------------------------


class PublicKeys:
    """The public keys (``*.key``) of a directory, read again when something changes there.

    Whoever can write there decides who comes in: the directory and its files have to be this user's or root's and
    writable by nobody else. Raises :class:`KeyFileError` where it is not so. Later, in :meth:`look`, a directory that
    is gone or open to others is one without keys, and a file that can't be used is left out; both are logged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._keys: frozenset[bytes] = frozenset()
        #: Another number whenever other keys were found.
        self.version = 0
        self._seen: object = None
        self._looked = float("-inf")
        self._check_directory()
        self.look(0.0)

    def __len__(self) -> int:
        return len(self._keys)

    def knows(self, key: bytes) -> bool:
        """Whether this public key (40 bytes of Z85) was there at the last look."""
        return key in self._keys

    def look(self, age_s: float = LOOK_S) -> None:
        """Looks at the directory unless that was done in the last ``age_s`` seconds."""
        now = time.monotonic()
        if now - self._looked < age_s:
            return
        self._looked = now
        keys: frozenset[bytes] = frozenset()
        try:
            self._check_directory()
            state = self._state()
            if state == self._seen:
                return
            keys = frozenset(self._read_all())
            # A file may be written again within one tick of the file system's clock: then it is read once more.
            settled = all(time.time_ns() - changed > _TICK_NS for _, _, _, changed, _ in state)
            seen: object = state if settled else None
        except (KeyFileError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _STARVED:
                return  # the next look will tell
            seen = str(error)
            if seen == self._seen:
                return
            log.error("no client is let in any more: %s", seen)
        self.version += keys != self._keys
        self._keys, self._seen = keys, seen

    def _check_directory(self) -> None:
        try:
            found = self.directory.stat()
        except OSError as error:
            raise KeyFileError(
                f"the directory of clients' keys {self.directory} can't be read: {error.strerror}; make it, and "
                "put the .key files of the clients there"
            ) from None
        if not stat.S_ISDIR(found.st_mode):
            raise KeyFileError(f"{self.directory} is no directory; give one that holds the .key files of the clients")
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o022:
            raise KeyFileError(
                f"others can change the directory of clients' keys {self.directory}, and so let themselves in; it has "
                "to be this user's, of mode 0700 or 0755"
            )

    def _state(self) -> tuple[tuple[str, int, int, int, int], ...]:
        """What changes when a file there is added, removed, replaced, written or given to somebody else."""
        state = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if not entry.name.endswith(".key"):
                    continue
                try:
                    found = entry.stat()  # of what a link points to: Kubernetes mounts keys so
                except FileNotFoundError:
                    continue  # removed just now, or a link to nowhere
                state.append((entry.name, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size))
        return tuple(sorted(state))

    def _read_all(self) -> Iterator[bytes]:
        for path in sorted(self.directory.glob("*.key")):
            try:
                if path.stat().st_uid not in (os.geteuid(), 0):
                    raise KeyFileError(f"the key file {path} belongs to somebody else; it has to be this user's")
                yield read_public(path)
            except DescriptorsExhaustedError:
                raise
            except (KeyFileError, OSError) as error:
                log.error("a client's key is left out: %s", error)
