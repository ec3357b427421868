"""The manifests for Gramine: rendered as gramine-manifest renders them, and compared with the documented syntax."""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

import pytest
import typer
from manifests import (
    DIGEST,
    GRAMINE,
    KINDS,
    PKGLIBDIR,
    QUOTES,
    Rendered,
    check,
    files_for_options,
    inventory,
    manifest,
    rendered,
    syntax,
    template,
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return files_for_options(tmp_path)


# --- syntax ---------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "sgx": {"SGX": "1"},
    "edmm": {"SGX": "1", "EDMM": "1"},
    "attested": {"SGX": "1", "RA_TYPE": "dcap"},
    "debug": {"SGX": "1", "DEBUG": "1", "LOG_LEVEL": "all"},
    "encrypted model": {"SGX": "1", "MODEL_KEY_NAME": "_sgx_mrsigner"},
    "module": {"MODULE": "tsqp.run", "PROMPT": ""},
    "quotes": {"PROMPT": "He said: \"Go\\home\", 'and' {{ went }}\n\tüß\x7f"},
    "sizes": {"ENCLAVE_SIZE": "16G", "MAX_THREADS": "99", "THREADS": "8"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_key_is_known_to_gramine(kind, variant):
    made = rendered(kind, **VARIANTS[variant])
    for version in syntax.VERSIONS:
        assert syntax.problems(made.tables, version) == []


@pytest.mark.parametrize("secret_key_name", ["", "runner-key"])
def test_every_key_is_known_to_gramine_with_all_files(files, secret_key_name):
    made = rendered("runner", **files, SECRET_KEY_NAME=secret_key_name)
    for version in syntax.VERSIONS:
        assert syntax.problems(made.tables, version) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("sgx.thread_num = 4", "sgx.thread_num is unknown"),
        ("sgx.require_avx = true", "sgx.require_avx is unknown"),
        ("sgx.nonpie_binary = true", "sgx.nonpie_binary is unknown"),
        ('fs.mount.lib.uri = "file:/lib"', "fs.mount is unknown"),
        ('loader.preload = "file:x"', "loader.preload is unknown"),
        ('loader.entrypoint = "file:x"', "loader.entrypoint is unknown"),
        ("loader.insecure__use_cmdline_argv = true", "loader.insecure__use_cmdline_argv is insecure"),
        ("loader.insecure__use_host_env = true", "loader.insecure__use_host_env is insecure"),
        ('fs.insecure__keys.default = "00112233445566778899aabbccddeeff"', "fs.insecure__keys.default is insecure"),
        ("loader.env.HOME = { passthrough = false }", "loader.env.HOME = {'passthrough': False} is not of the doc"),
        ("sgx.max_threads = '4'", "sgx.max_threads = '4' is not of the documented form"),
        ("sgx.max_threads = true", "sgx.max_threads = True is not of the documented form"),
        ("sgx.enclave_size = '4 GB'", "sgx.enclave_size = '4 GB' is not of the documented form"),
        ("sgx.enclave_size = 4", "sgx.enclave_size = 4 is not of the documented form"),
        ("sgx.remote_attestation = 'epid'", "sgx.remote_attestation = 'epid' is not of the documented form"),
        ("sgx.remote_attestation = true", "sgx.remote_attestation = True is not of the documented form"),
        ("sgx.allowed_files = ['/tmp']", "sgx.allowed_files = ['/tmp'] is not of the documented form"),
        ("sgx.trusted_files = [{uri = 'file:x', md5 = 'y'}]", "sgx.trusted_files = [{'uri': 'file:x', 'md5': 'y'}] is"),
        ("sys.disallow_subprocesses = 1", "sys.disallow_subprocesses = 1 is not of the documented form"),
        ("sys.disable_subprocesses = true", "sys.disable_subprocesses is unknown"),
        ("fs.mounts = [{path = '/x', uri = 'tmpfs:/x'}]", "fs.mounts = [{'path': '/x', 'uri': 'tmpfs:/x'}] is not"),
        ("fs.mounts = [{path = 'x', uri = 'file:x'}]", "fs.mounts = [{'path': 'x', 'uri': 'file:x'}] is not"),
        ("fs.mounts = [{type = 'shm', path = '/x', uri = 'dev:x'}]", "fs.mounts = [{'type': 'shm', 'path': '/x'"),
        ("fs.mounts = [{path = '/x', uri = 'file:x', key_name = 'k'}]", "fs.mounts = [{'path': '/x', 'uri': 'file:x',"),
        ("loader.argv_src_file = 'file:x'\nloader.argv = ['x']", "only one may be given"),
        ("sgx.edmm_enable = true\nsgx.preheat_enclave = true", "can't go with sgx.edmm_enable"),
    ],
)
def test_what_gramine_does_not_take_is_found(line, problem):
    """Otherwise the tests above could not fail."""
    base = {
        "loader.entrypoint": 'loader.entrypoint.uri = "file:x"',
        "libos": 'libos.entrypoint = "/x"',
        "fs.mounts": "fs.mounts = [{path = '/x', uri = 'file:x'}]",
    }
    kept = [text for key, text in base.items() if not line.startswith(key)]
    found = syntax.problems(check.parse("\n".join([*kept, line])), "1.9")
    assert len(found) == 1
    assert problem in found[0]
    assert syntax.problems(check.parse("\n".join(base.values())), "1.9") == []


def test_versions_differ_in_the_loader():
    """The string was deprecated in 1.8 and is gone in 1.9; the table is right in both."""
    rest = "libos.entrypoint = '/x'\nfs.mounts = []\n"
    old = check.parse(rest + "loader.entrypoint = 'file:x'")
    assert syntax.problems(old, "1.8") == []
    assert syntax.problems(old, "1.9") != []
    missing = syntax.problems(check.parse(rest), "1.9")
    assert missing == ["loader.entrypoint is missing"]


def test_a_variable_that_is_not_given_is_an_error():
    with pytest.raises(inventory.InventoryError, match="'log_level' is undefined"):
        check.checked_text(template("local"), {})


# --- files ----------------------------------------------------------------------------------------------------


def outside(uri: str) -> str:
    return uri.split(":", 1)[1]


def covers(mount: str, file: str) -> bool:
    return file.rstrip("/") == mount or file.startswith(f"{mount}/")


@pytest.fixture(params=["runner", "local", "all files", "encrypted"])
def made(request: pytest.FixtureRequest, files: dict[str, str]) -> Rendered:
    options = {
        "runner": {},
        "local": {},
        "all files": files,
        "encrypted": {**files, "SGX": "1", "SECRET_KEY_NAME": "_sgx_mrenclave", "MODEL_KEY_NAME": "model"},
    }
    return rendered("local" if request.param == "local" else "runner", **options[request.param])


def test_every_mounted_file_is_trusted_allowed_or_encrypted_and_the_other_way_round(made):
    open_to = {"untrusted_shm": made.allowed, "chroot": made.trusted}
    for mount in made.mounts:
        if mount.get("type", "chroot") in open_to:
            listed = map(outside, open_to[mount.get("type", "chroot")])
            assert any(covers(outside(mount["uri"]), file) for file in listed), mount
    roots = [outside(mount["uri"]) for mount in made.mounts if mount.get("type") in (None, "untrusted_shm")]
    for uri in made.trusted + made.allowed:
        assert any(covers(root, outside(uri)) for root in roots), uri


def test_what_is_encrypted_is_not_trusted_as_well(made):
    """It would be hashed as it lies on the disk, and open to the host."""
    for mount in made.mounts:
        if mount.get("type") == "encrypted":
            assert not any(covers(outside(mount["uri"]), outside(uri)) for uri in made.trusted + made.allowed)


def test_every_trusted_file_is_there_and_directories_end_in_a_slash(made):
    """gramine-sgx-sign fails otherwise."""
    for uri in made.trusted:
        path = outside(uri)
        if not path.startswith(str(PKGLIBDIR)):
            assert os.path.isdir(path) == path.endswith("/"), path
            assert os.path.exists(path), path


def test_no_whole_tree_is_mounted_or_trusted(made):
    wide = {"/", "/usr", "/lib", "/etc", "/home", "/root", "/opt", "/dev", "/dev/shm", "/tmp", "/usr/lib", "/proc"}
    wide |= {str(Path.home()), sys.prefix, sys.base_prefix, inventory.sysconfig.get_path("purelib")}
    wide |= {str(Path(inventory.sysconfig.get_path("stdlib")) / name) for name in ("site-packages", "test")}
    for uri in [mount.get("uri", "file:") for mount in made.mounts] + made.trusted + made.allowed:
        assert outside(uri).rstrip("/") not in {path.rstrip("/") or "/" for path in wide}


def test_paths_inside_tell_nothing_of_this_machine(made):
    inside = [mount["path"] for mount in made.mounts]
    assert all(path.startswith(("/tsqp/", "/dev/shm/tsqp")) or path in ("/tmp", "/lib") for path in inside)
    assert len(set(inside)) == len(inside)
    words = [*made.env.values(), made.tables["libos"]["entrypoint"], *made.argv]
    assert not any(word.startswith(("/home", "/root", "/usr", str(Path.home()), sys.prefix)) for word in words)


@pytest.mark.parametrize("path", [*sorted(GRAMINE.glob("*.*")), GRAMINE / "Makefile"], ids=lambda path: path.name)
def test_no_developers_path_in_what_is_shipped(path):
    text = path.read_text()
    assert not any(word in text for word in ("/home/", "/root", "/Users/", "/work", str(Path.home())))


def test_tmpfs_is_mounted_first(made):
    assert made.mounts[0] == {"type": "tmpfs", "path": "/tmp"}
    assert [mount["path"] for mount in made.mounts[1:3]] == ["/lib", "/tsqp/bin/python3"]
    assert made.mounts[1]["uri"] == f"file:{PKGLIBDIR}/runtime/glibc"
    assert f"file:{PKGLIBDIR}/runtime/glibc/" in made.trusted


def test_a_mount_below_another_comes_after_it(made):
    paths = [mount["path"] for mount in made.mounts]
    for number, path in enumerate(paths):
        assert not any(covers(path, before) for before in paths[:number])


def test_the_ring_is_one_file_and_the_only_one_that_is_allowed():
    made = rendered("runner", SHM_NAME="tsqp-a.b_c-1", SHM_DIR="/dev/shm/sub")
    shared = [mount for mount in made.mounts if mount.get("type") == "untrusted_shm"]
    uri = "dev:/dev/shm/sub/tsqp-a.b_c-1"
    assert shared == [{"type": "untrusted_shm", "path": "/dev/shm/tsqp-a.b_c-1", "uri": uri}]
    assert made.allowed == [uri]
    local = rendered("local")
    assert local.allowed == []
    assert {mount.get("type") for mount in local.mounts} == {None, "tmpfs"}


def test_the_runner_has_no_weights_and_local_has_them():
    names = {kind: {mount["path"] for mount in rendered(kind).mounts} for kind in KINDS}
    for kind in KINDS:
        assert {"/tsqp/model/config.json", "/tsqp/model/tokenizer.json"} <= names[kind]
    assert "/tsqp/model/model.safetensors" in names["local"] - names["runner"]


def test_an_encrypted_model_is_a_directory_with_its_keys_name():
    made = rendered("runner", MODEL_KEY_NAME="wrapped")
    assert made.mount("/tsqp/model") == {
        "type": "encrypted",
        "path": "/tsqp/model",
        "uri": f"file:{made.values['model_directory']}",
        "key_name": "wrapped",
    }
    assert not any(mount["path"].startswith("/tsqp/model/") for mount in made.mounts)


def test_secret_files_are_encrypted_and_public_ones_trusted(files):
    made = rendered("runner", **files, SGX="1", SECRET_KEY_NAME="_sgx_mrsigner", MODULE="tsqp.run")
    for path, name in (("/tsqp/keys/runner", "CURVE_KEY"), ("/tsqp/keys/prompt", "PROMPT_FILE")):
        mount = {"type": "encrypted", "path": path, "uri": f"file:{files[name]}", "key_name": "_sgx_mrsigner"}
        assert made.mount(path) == mount
    for path, name in (("/tsqp/trusted/server", "CURVE_SERVER"), ("/tsqp/trusted/weights", "TRUSTED_WEIGHTS")):
        assert made.mount(path) == {"path": path, "uri": f"file:{files[name]}"}
        assert f"file:{files[name]}" in made.trusted
    assert made.env["TSQP_CURVE_KEY"] == "/tsqp/keys/runner"
    assert made.env["TSQP_CURVE_SERVER"] == "/tsqp/trusted/server"
    assert made.option("--prompt-file") == "/tsqp/keys/prompt"
    assert "--prompt" not in made.argv
    assert made.option("--trusted-weights") == "/tsqp/trusted/weights"
    assert made.option("--trusted-digest") == DIGEST
    assert not any(name.startswith("TSQP_CURVE") for name in rendered("runner").env)


def test_terminals_and_windows_stay_outside():
    made = rendered("runner")
    names = {Path(outside(uri)).name.split(".")[0] for uri in made.trusted}
    assert not names & {"_tkinter", "readline", "_curses", "libX11", "libtk8", "idlelib", "ensurepip"}
    assert {"_ssl", "_ctypes", "_struct", "json", "torch", "libstdc++"} - names <= {"torch"}  # torch by its parts
    assert not any("/torch/include/" in uri or "/torch/test/" in uri for uri in made.trusted)


# --- command and environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "words", "command"), [("tsqp.run", ["tsqp.run"], "run"), ("tsqp", ["tsqp", "generate"], "generate")]
)
def test_the_arguments_are_options_of_the_command(module, words, command):
    from tsqp import cli

    known = {opt for param in typer.main.get_command(cli.app).commands[command].params for opt in param.opts}
    for kind in KINDS:
        argv = rendered(kind, MODULE=module, ARGS="--stats --seed 3").argv
        assert argv[: 3 + len(words)] == ["python3", "-S", "-m", *words]
        assert {word for word in argv[3 + len(words) :] if word.startswith("--")} <= known
        assert argv[-3:] == ["--stats", "--seed", "3"]


def test_the_arguments_are_those_asked_for():
    made = rendered("runner", PROMPT=QUOTES, ENDPOINT="tcp://10.0.0.1:7", PLACEMENT="layer", MAX_NEW_TOKENS="5")
    assert made.option("--prompt") == QUOTES
    assert made.option("--endpoint") == "tcp://10.0.0.1:7"
    assert made.option("--placement") == "layer"
    assert made.option("--max-new-tokens") == "5"
    assert made.option("--model") == "/tsqp/model"
    local = rendered("local", PLACEMENT="layer")
    assert local.option("--placement") == "local"
    assert "--endpoint" not in local.argv
    assert rendered("runner", PROMPT="").argv[:5] == ["python3", "-S", "-m", "tsqp.run", "--model"]


def test_the_environment_is_the_manifests_alone():
    made = rendered("runner", THREADS="3")
    assert all(isinstance(value, str) for value in made.env.values())  # nothing is passed through
    assert made.env["LD_LIBRARY_PATH"].split(":") == ["/tsqp/lib", "/lib"]
    assert made.env["PYTHONHOME"] == "/tsqp/python"
    assert made.env["PYTHONPATH"] == "/tsqp/site"
    assert {made.env[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TSQP_THREADS")} == {"3"}
    assert made.env["OMP_WAIT_POLICY"] == "passive"
    assert made.tables["libos"]["entrypoint"] == "/tsqp/bin/python3"
    assert made.tables["loader"]["entrypoint"] == {"uri": f"file:{PKGLIBDIR}/libsysdb.so"}


def test_a_runner_starts_nothing_and_can_be_ended():
    for kind in KINDS:
        assert rendered(kind).tables["sys"]["disallow_subprocesses"] is True
        assert rendered(kind).tables["sys"]["enable_sigterm_injection"] is True


def test_the_options_of_sgx():
    plain, edmm = rendered("runner").tables["sgx"], rendered("runner", SGX="1", EDMM="1").tables["sgx"]
    assert (plain["debug"], plain["edmm_enable"], plain["remote_attestation"]) == (False, False, "none")
    assert edmm["edmm_enable"] is True
    assert "enclave_size" not in edmm
    assert rendered("local", RA_TYPE="dcap").tables["sgx"]["remote_attestation"] == "dcap"
    assert rendered("local", DEBUG="1").tables["sgx"]["debug"] is True
    given = rendered("local", ENCLAVE_SIZE="16G", MAX_THREADS="99").tables["sgx"]
    assert (given["enclave_size"], given["max_threads"]) == ("16G", 99)
    assert rendered("local", THREADS="5").tables["sgx"]["max_threads"] == 2 * 5 + 12


@pytest.mark.parametrize(
    ("weights_mib", "work", "size"),
    [(0, "1", "2G"), (0, "512", "4G"), (341, "342", "4G"), (2400, "512", "16G"), (15000, "512", "64G")],
)
def test_an_enclave_holds_its_model_twice_and_half_as_much_again(weights_mib, work, size):
    assert manifest.enclave_size(weights_mib << 20, {"WORK_MIB": work}) == size
    reckoned = (1024 + 2 * weights_mib + int(work)) * 1.5
    assert reckoned <= int(size[:-1]) * 1024 < 2 * reckoned


def test_the_two_manifests_differ_only_in_what_they_are_for():
    changed = [
        line[2:]
        for line in difflib.ndiff(template("runner").splitlines(), template("local").splitlines())
        if line.startswith(("- ", "+ "))
    ]
    words = ("curve", "trusted_weights", "shm", "sgx.allowed_files", "{%", "#", "]")
    assert changed
    for line in changed:
        assert not line.strip() or any(word in line for word in words), line
