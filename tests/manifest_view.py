"""Runs the command of a manifest natively, seeing what a runner in Gramine sees: only the mounts, and of directories
only what is trusted; with the manifest's arguments and environment. ``manifest_view.py MANIFEST ROOT PKGLIBDIR``.

The C library is this machine's in the place of Gramine's. Needs root or user namespaces: leaves with :data:`CANNOT`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path
from typing import Any

#: Exit status where namespaces can't be made.
CANNOT = 77
_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)
_GLIBC = ("ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libmvec.so.1", "libdl.so.2", "libpthread.so.0")
_GLIBC += ("librt.so.1", "libutil.so.1", "libresolv.so.2")


def call(name: str, *arguments: Any) -> None:
    """A function of libc that answers 0, or OSError."""
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def own_namespace() -> None:
    """Mounts from now on are this process's alone."""
    user, group = os.getuid(), os.getgid()
    call("unshare", _NEWNS if user == 0 else _NEWNS | _NEWUSER)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call("mount", None, b"/", None, _REC | _PRIVATE, None)


def show(outside: str, inside: Path, flags: int = _BIND) -> None:
    if Path(outside).is_dir():
        inside.mkdir(parents=True, exist_ok=True)
    else:
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.touch()
    call("mount", os.fsencode(outside), os.fsencode(inside), None, flags, None)


def show_trusted(outside: str, inside: Path, trusted: list[str]) -> None:
    """A mount: whole where it is trusted, else its parts that are."""
    if outside in trusted or f"{outside}/" in trusted:
        show(outside, inside)
        return
    inside.mkdir(parents=True, exist_ok=True)
    for path in trusted:
        if path.startswith(f"{outside}/"):
            show(path, inside / path.rstrip("/").removeprefix(f"{outside}/"))


def build(root: Path, manifest: dict[str, Any], pkglibdir: str) -> None:
    """The view, below ``root``."""
    call("mount", b"none", os.fsencode(root), b"tmpfs", 0, None)
    trusted = [uri.removeprefix("file:") for uri in manifest["sgx"]["trusted_files"]]
    allowed = [uri.split(":", 1)[1] for uri in manifest["sgx"]["allowed_files"]]
    for mount in manifest["fs"]["mounts"]:
        inside, outside = root / mount["path"][1:], mount.get("uri", ":").split(":", 1)[1]
        if mount.get("type") == "tmpfs":
            inside.mkdir()
        elif outside.startswith(pkglibdir):
            inside.mkdir()
            for name in _GLIBC:
                shutil.copy(_libc_directory() / name, inside)
        else:
            show_trusted(outside, inside, trusted + allowed)
    (root / "lib64").symlink_to("lib")
    show("/proc", root / "proc", _BIND | _REC)
    for name in ("urandom", "null"):
        show(f"/dev/{name}", root / "dev" / name)
    (root / "dev" / "attestation").mkdir()  # by which tsqp knows where it is


def _libc_directory() -> Path:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return Path(next(line.split()[-1] for line in lines if line.endswith("/libc.so.6"))).parent


def main() -> None:
    import check

    manifest = check.parse(Path(sys.argv[1]).read_text())
    root = Path(sys.argv[2])
    try:
        own_namespace()
        build(root, manifest, sys.argv[3])
    except PermissionError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT)
    os.chroot(root)
    os.chdir("/")
    os.execve(manifest["libos"]["entrypoint"], manifest["loader"]["argv"], manifest["loader"]["env"])


if __name__ == "__main__":
    main()
