"""Keys on the command line: ``tsqp keygen``, and the options of the commands that connect."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import zmq.auth
from commands import environment, serving, short_directory, tsqp_here
from keys import Keys

from tsqp.demo import model_path


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def test_keygen_makes_them_and_says_what_to_do(tmp_path, capsys):
    outcome = tsqp_here(capsys, "keygen", str(tmp_path / "keys"), "--name", "gpu")
    assert outcome.code == 0
    assert f"--curve-key {tmp_path}/keys/gpu.key_secret" in outcome.out
    public, secret = zmq.auth.load_certificate(tmp_path / "keys" / "gpu.key_secret")
    assert secret.decode() not in outcome.out + outcome.err
    again = tsqp_here(capsys, "keygen", str(tmp_path / "keys"), "--name", "gpu")
    assert again.code == 1
    assert "exists; nothing was changed" in again.err
    assert zmq.auth.load_certificate(tmp_path / "keys" / "gpu.key")[0] == public


@pytest.mark.watchdog(120)
def test_the_commands_take_them(keys, capsys):
    with short_directory() as directory:
        options = [f"--curve-key={keys.secret('server')}", f"--curve-clients={keys.clients}"]
        with serving(directory, *options) as served:
            ours = [f"--curve-key={keys.secret('client')}", f"--curve-server={keys.public('server')}"]
            where = ["--endpoint", served.endpoint]
            assert tsqp_here(capsys, "health", *where, *ours, "--timeout", "60").code == 0
            plain = tsqp_here(capsys, "health", *where, "--timeout", "60")
            assert plain.code == 1
            assert "this client has no keys and the server wants some" in plain.err
            prompt = ["--prompt", "And the king", "--max-new-tokens", "2", "--model", str(model_path())]
            assert "And the king" in tsqp_here(capsys, "generate", *prompt, *where, *ours).out
            prefill = tsqp_here(capsys, "prefill", "--tokens", "4", "--repeat", "1", *where, *ours)
            assert re.search(r"prefill +4 tokens", prefill.out)
    assert not any(keys.secret_text(name) in served.outcome.err for name in ("server", "client"))


@pytest.mark.parametrize("command", ["generate --prompt x", "prefill"])
def test_a_missing_key_is_told_before_torch_is_loaded(command):
    """Which takes seconds."""
    arguments = [*command.split(), "--curve-key", "/nowhere/a.key_secret", "--curve-server", "/nowhere/b.key"]
    code = (
        f"import sys, tsqp.cli\ntry: tsqp.cli.main({arguments})\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "False"], ended.stderr
    assert "/nowhere/a.key_secret" in ended.stderr
