"""What the manifests mount, pass and set is enough to generate text, as far as this can be known without Gramine."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import manifest_view
import pytest
import torch
from manifests import GRAMINE, PKGLIBDIR, Rendered, inventory, rendered
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsqp.server import GPUServer

PROMPT = "And the king said"
TOKENS = 6
LIMIT_S = 100
DEMO = Path(inventory.packages(inventory.distributions("tsqp"))["tsqp"]) / "demo"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="Gramine is for x86-64 Linux"
)


@pytest.fixture(scope="module")
def expected() -> str:
    """The text of transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0], skip_special_tokens=True)


@pytest.fixture
def endpoint_of_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server of the demo model that has made the segment with the manifest's name."""
    monkeypatch.setenv("TSQP_SHM_NAME", "tsqp-runner")
    server = GPUServer(str(DEMO), "tcp://127.0.0.1:0", device="cpu", dtype="float32")
    with server.start():
        yield server.endpoint


def run(made: Rendered, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The manifest's command in its view; skips where there can be none."""
    text = made.text
    package = made.mount("/tsqp/site/tsqp")["uri"].removeprefix("file:")
    if inventory.is_editable(inventory.distributions("tsqp")["tsqp"]):
        whole = tmp_path / "wheel"  # a checkout's compiled modules lie elsewhere
        shutil.copytree(package, whole)
        for source in whole.glob("*.pyx"):
            shutil.copy(importlib.util.find_spec(f"tsqp.{source.stem}").origin, whole)
        text = text.replace(package, str(whole))
    (tmp_path / "manifest").write_text(text)
    (tmp_path / "root").mkdir()
    command = [sys.executable, manifest_view.__file__, "manifest", "root", str(PKGLIBDIR)]
    env = {**os.environ, "PYTHONPATH": str(GRAMINE)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode == manifest_view.CANNOT:
        pytest.skip(f"needs root or user namespaces: {done.stderr.strip()}")
    return done


def test_a_runner_generates_from_what_its_manifest_shows_it(endpoint_of_server, expected, tmp_path, shm_directory):
    made = rendered(
        "runner",
        ENDPOINT=endpoint_of_server,
        SHM_DIR=str(shm_directory),
        PROMPT=PROMPT,
        MAX_NEW_TOKENS=str(TOKENS),
        THREADS="1",
        ARGS="--stats",
    )
    done = run(made, tmp_path)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "shm+tcp" in done.stderr
    assert re.search(r"ZeroMQ\W+0\W", done.stderr), done.stderr  # messages: all of them went through the ring


@pytest.mark.skipif("TSQP_SOAK" not in os.environ, reason="a long proof; make soak runs it")
def test_the_whole_model_generates_from_what_its_manifest_shows_it(expected, tmp_path):
    made = rendered("local", PROMPT=PROMPT, MAX_NEW_TOKENS=str(TOKENS), THREADS="1", ARGS="--dtype float32")
    done = run(made, tmp_path)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_a_file_that_is_not_in_the_manifest_is_missed(tmp_path):
    """Otherwise the view would prove nothing."""
    made = rendered("local", MODULE="tsqp")
    lines = [line for line in made.text.splitlines() if 'tsqp/site/typer"' not in line]
    done = run(Rendered(made.values, "\n".join(lines), made.tables), tmp_path)
    assert done.returncode != 0
    assert re.search(r"No module named '?typer", done.stderr)
