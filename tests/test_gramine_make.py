"""What gramine/ refuses, and its Makefile, with and without Gramine's tools."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from manifests import (
    DIGEST,
    GRAMINE,
    KINDS,
    QUOTES,
    check,
    definitions,
    files_for_options,
    inventory,
    make,
    manifest,
    rendered,
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return files_for_options(tmp_path)


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SHM_NAME": "ring"}, "SHM_NAME='ring' does not start with tsqp"),
        ({"MODEL": "/nonexistent"}, r"/nonexistent has no config\.json"),
        ({"THREADS": "0"}, "THREADS=0 is not a positive whole number"),
        ({"THREADS": "two"}, "THREADS=two is not a positive whole number"),
        ({"EDMM": "yes"}, "EDMM=yes is neither 0 nor 1"),
        ({"TRUSTED_DIGEST": DIGEST}, "belong together"),
        ({"CURVE_SERVER": "/nonexistent"}, "CURVE_SERVER=/nonexistent is no file"),
        ({"SHM_NAME": 'tsqp"'}, "can't stand in a manifest"),
        ({"SHM_NAME": "tsqp\n"}, "can't stand in a manifest"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(inventory.InventoryError, match=message):
        rendered("runner", **options)


@pytest.mark.parametrize("name", ["CURVE_KEY", "PROMPT_FILE"])
def test_a_secret_that_the_host_could_read_is_refused_under_sgx(files, name):
    with pytest.raises(inventory.InventoryError, match="would be readable by the host"):
        rendered("runner", SGX="1", **{name: files[name]})
    assert f"file:{files[name]}" in rendered("runner", **{name: files[name]}).trusted


def test_a_model_without_weights_is_enough_for_the_runner_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    paths = [mount["path"] for mount in rendered("runner", MODEL=str(tmp_path)).mounts]
    assert [path for path in paths if path.startswith("/tsqp/model")] == ["/tsqp/model/config.json"]
    with pytest.raises(inventory.InventoryError, match=r"no \*\.safetensors"):
        rendered("local", MODEL=str(tmp_path))


def test_links_of_a_model_are_followed(tmp_path):
    """A snapshot of the Hugging Face cache is a directory of links; the link's target is what is hashed and opened."""
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").symlink_to(tmp_path / "blob")
    made = rendered("runner", MODEL=str(tmp_path / "snapshot"))
    assert made.mount("/tsqp/model/config.json")["uri"] == f"file:{tmp_path}/blob"
    assert f"file:{tmp_path}/blob" in made.trusted


# --- the Makefile ---------------------------------------------------------------------------------------------


def without_gramine(tmp_path: Path) -> str:
    """A PATH with make's own needs, and no Gramine even where it is installed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "make", "ldd", "cat", "test", "rm", "bash", "sed"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    return str(tools)


def test_check_renders_both_without_gramine(tmp_path):
    done = make("check", "SGX=1", "EDMM=1", cwd=tmp_path, path=without_gramine(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every key is known to Gramine 1.8 and 1.9") == 2
    for kind in KINDS:
        made = check.parse((tmp_path / f"{kind}.manifest.checked").read_text())
        assert made["sgx"]["edmm_enable"] is True
    assert make("clean", cwd=tmp_path).returncode == 0
    assert not list(tmp_path.glob("*.manifest*"))


def test_check_fails_with_one_sentence(tmp_path):
    done = make("check", "SHM_NAME=ring", cwd=tmp_path)
    assert done.returncode != 0
    assert "runner.manifest.template: SHM_NAME='ring' does not start with tsqp" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("target", "tool"),
    [("all", "gramine-manifest"), ("run-direct", "gramine-manifest"), ("run-sgx", "gramine-manifest")],
)
def test_without_gramine_make_says_what_to_install(tmp_path, target, tool):
    done = make(target, cwd=tmp_path, path=without_gramine(tmp_path))
    assert done.returncode != 0
    assert "gramine-manifest is missing: install Gramine 1.8 or newer" in done.stderr


def fake(directory: Path, name: str, script: str) -> None:
    """A tool of Gramine's on the PATH, in Python."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_gramine_manifest_is_given_every_variable(tmp_path, monkeypatch):
    fake(tmp_path / "tools", "gramine-manifest", "json.dump(sys.argv[1:-1], open(sys.argv[-1], 'w'))")
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{os.environ['PATH']}")
    values = definitions("runner", PROMPT=QUOTES)
    source = GRAMINE / "runner.manifest.template"
    manifest.render(source, tmp_path / "out", values)
    *defined, given = json.loads((tmp_path / "out").read_text())
    assert given == str(source)
    assert dict(word.removeprefix("-D").split("=", 1) for word in defined) == values


def test_make_signs_under_sgx_and_says_what_is_missing_to_run(tmp_path):
    tools = tmp_path / "tools"
    fake(tools, "gramine-manifest", "open(sys.argv[-1], 'w').write('x')")
    fake(tools, "gramine-sgx-sign", "json.dump(sys.argv[1:], open(sys.argv[sys.argv.index('--output') + 1], 'w'))")
    fake(tools, "gramine-direct", "print('ran', *sys.argv[1:])")
    # What make runs is the Python's own manifest.py, which wants a wheel: here a stand-in that takes its place.
    wheel = "name = sys.argv[2].split('/')[-1].removesuffix('.template')\nopen(f'{sys.argv[4]}/{name}', 'w').write('x')"
    fake(tools, "python-of-a-wheel", wheel)
    path = f"{tools}:{os.environ['PATH']}"
    done = make("SGX=1", "PYTHON=python-of-a-wheel", "SIGNING_KEY=k.pem", cwd=tmp_path, path=path)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        signed = json.loads((tmp_path / f"{kind}.manifest.sgx").read_text())
        words = ["--manifest", f"{tmp_path}/{kind}.manifest", "--output", f"{tmp_path}/{kind}.manifest.sgx"]
        assert signed == [*words, "--key", "k.pem"]
    done = make("run-direct", "PYTHON=python-of-a-wheel", "SHM_NAME=tsqp-none", cwd=tmp_path, path=path)
    assert done.returncode != 0
    assert "/dev/shm/tsqp-none does not exist: start the server first, with TSQP_SHM_NAME=tsqp-none" in done.stderr
    done = make("run-direct", "WHICH=local", "PYTHON=python-of-a-wheel", cwd=tmp_path, path=path)
    assert (done.returncode, done.stdout) == (0, "ran local\n")


def test_an_editable_install_is_refused(tmp_path):
    if not inventory.is_editable(inventory.distributions("tsqp")["tsqp"]):
        pytest.skip("tsqp is not installed editable here")
    fake(tmp_path / "tools", "gramine-manifest", "raise SystemExit('not reached')")
    done = make("all", cwd=tmp_path, path=f"{tmp_path}/tools:{os.environ['PATH']}")
    assert done.returncode != 0
    assert "tsqp is installed editable" in done.stderr
    assert not list(tmp_path.glob("*.manifest"))
