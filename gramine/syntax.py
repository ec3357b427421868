"""The keys of a Gramine manifest that version 1.8 and 1.9 know, with the type of their values.

After Documentation/manifest-syntax.rst of gramineproject/gramine. gramine-manifest of 1.8 and newer checks a manifest
too; this does it where Gramine is not installed, and refuses keys that are insecure in an enclave.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

VERSIONS = ("1.8", "1.9")
Check = Callable[[Any], bool]

_SIZE = re.compile(r"\d+[KMG]?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_URI = re.compile(r"(file|dev):[^\n]+")


def _is(kind: type) -> Check:
    return lambda value: type(value) is kind


def _one_of(*names: str) -> Check:
    return lambda value: value in names


def _matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _table(required: Mapping[str, Check], optional: Mapping[str, Check]) -> Check:
    known = {**optional, **required}
    return lambda value: (
        isinstance(value, dict)
        and set(required) <= set(value) <= set(known)
        and all(known[key](entry) for key, entry in value.items())
    )


def _any(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


text, flag, number = _is(str), _is(bool), _is(int)
size, uri, sha256 = _matches(_SIZE), _matches(_URI), _matches(_SHA256)
_path = _matches(re.compile(r"/[^\n]*"))
_feature = _one_of("unspecified", "disabled", "required")
_hardening = _one_of("disabled", "required")
_environment = _any(text, _table({"value": text}, {}), _table({"passthrough": lambda value: value is True}, {}))

mount = _any(
    _table({"path": _path, "uri": uri}, {"type": _one_of("chroot")}),
    _table({"path": _path, "uri": uri, "type": _one_of("encrypted")}, {"key_name": text}),
    _table({"path": _path, "type": _one_of("tmpfs")}, {"uri": text}),
    _table({"path": _path, "uri": uri, "type": _one_of("untrusted_shm")}, {}),
)
_root = _any(_table({"uri": uri}, {"type": _one_of("chroot")}), _table({"type": _one_of("tmpfs")}, {"uri": text}))

#: ``loader.env.*`` and the like stand for any name.
_KEYS: dict[str, Check] = {
    "loader.entrypoint.uri": uri,
    "loader.entrypoint.sha256": sha256,
    "loader.log_level": _one_of("none", "error", "warning", "debug", "trace", "all"),
    "loader.log_file": text,
    "loader.argv": _list_of(text),
    "loader.argv_src_file": uri,
    "loader.env.*": _environment,
    "loader.env_src_file": uri,
    "loader.insecure__use_cmdline_argv": flag,
    "loader.insecure__use_host_env": flag,
    "loader.insecure__disable_aslr": flag,
    "loader.uid": number,
    "loader.gid": number,
    "libos.entrypoint": text,
    "libos.check_invalid_pointers": flag,
    "fs.mounts": _list_of(mount),
    "fs.root": _root,
    "fs.start_dir": text,
    "fs.insecure__keys.*": _matches(re.compile(r"[0-9a-f]{32}")),
    "sys.stack.size": size,
    "sys.brk.max_size": size,
    "sys.insecure__allow_eventfd": flag,
    "sys.enable_sigterm_injection": flag,
    "sys.disallow_subprocesses": flag,
    "sys.enable_extra_runtime_domain_names_conf": flag,
    "sys.experimental__enable_flock": flag,
    "sys.fds.limit": number,
    "sys.allowed_ioctls": _list_of(_table({"request_code": number}, {"struct": text})),
    "sgx.debug": flag,
    "sgx.edmm_enable": flag,
    "sgx.enclave_size": size,
    "sgx.max_threads": number,
    "sgx.insecure__rpc_thread_num": number,
    "sgx.use_exinfo": flag,
    "sgx.cpu_features.avx": _feature,
    "sgx.cpu_features.avx512": _feature,
    "sgx.cpu_features.amx": _feature,
    "sgx.cpu_features.mpx": _hardening,
    "sgx.cpu_features.pkru": _hardening,
    "sgx.isvprodid": number,
    "sgx.isvsvn": number,
    "sgx.allowed_files": _list_of(uri),
    "sgx.trusted_files": _list_of(_any(uri, _table({"uri": uri}, {"sha256": sha256}))),
    "sgx.file_check_policy": _one_of("strict", "allow_all_but_log"),
    # EPID is gone from Intel's service: of what 1.8 still knows it is left out.
    "sgx.remote_attestation": _one_of("none", "dcap"),
    "sgx.preheat_enclave": flag,
    "sgx.enable_stats": flag,
    "sgx.profile.enable": _one_of("none", "main", "all"),
    "sgx.vtune_profile": flag,
}
#: 1.8 takes the string and warns, 1.9 knows the table only.
_ONLY: dict[str, dict[str, Check]] = {"1.8": {"loader.entrypoint": uri}, "1.9": {}}
REQUIRED = ("libos.entrypoint", "fs.mounts")
#: What Gramine allows and no enclave should have.
INSECURE = (
    "loader.insecure__use_cmdline_argv",
    "loader.insecure__use_host_env",
    "loader.insecure__disable_aslr",
    "fs.insecure__keys.*",
    "sys.insecure__allow_eventfd",
    "sgx.insecure__rpc_thread_num",
)


def known(version: str) -> dict[str, Check]:
    """Every key of ``version`` with what its value has to pass."""
    return {**_KEYS, **_ONLY[version]}


def problems(manifest: Mapping[str, Any], version: str) -> list[str]:
    """What is wrong with a parsed manifest, a sentence each; nothing where it is right."""
    keys = known(version)
    found = list(_walk(manifest, "", keys))
    found += [f"{key} is missing" for key in REQUIRED if _get(manifest, key) is None]
    if _get(manifest, "loader.entrypoint") is None:
        found.append("loader.entrypoint is missing")
    argv = ("loader.argv", "loader.argv_src_file", "loader.insecure__use_cmdline_argv")
    if sum(_get(manifest, key) is not None for key in argv) > 1:
        found.append(f"of {', '.join(argv)} only one may be given")
    if _get(manifest, "sgx.edmm_enable") and _get(manifest, "sgx.preheat_enclave"):
        found.append("sgx.preheat_enclave can't go with sgx.edmm_enable")
    return found


def _walk(table: Mapping[str, Any], above: str, keys: Mapping[str, Check]) -> Iterator[str]:
    for name, value in table.items():
        key = f"{above}{name}"
        pattern = key if key in keys else f"{above}*"
        deeper = isinstance(value, dict) and any(other.startswith(f"{key}.") for other in keys)
        if pattern in INSECURE:
            yield f"{key} is insecure"
        elif deeper:
            yield from _walk(value, f"{key}.", keys)
        elif pattern not in keys:
            yield f"{key} is unknown"
        elif not keys[pattern](value):
            yield f"{key} = {value!r} is not of the documented form"


def _get(manifest: Mapping[str, Any], key: str) -> Any:
    value: Any = manifest
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
