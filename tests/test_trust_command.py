"""``tsqp trust``, and the commands that take what it makes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from commands import serving, short_directory, tsqp_here

from tsqp.demo import model_path
from tsqp.trusted_making import write_trusted_weights


def digest_of(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


@pytest.mark.watchdog(180)
def test_the_file_of_trust_is_what_generate_and_prefill_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TSQP_TRUSTED_DIGEST", raising=False)
    file = tmp_path / "trusted"
    done = tsqp_here(capsys, "trust", "--out", str(file))
    assert (done.code, done.out) == (0, digest_of(file) + "\n")
    assert write_trusted_weights(model_path(), tmp_path / "again") == done.out.strip()
    prompt = ("--prompt", "And the king said", "--max-new-tokens", "5")
    with short_directory() as directory, serving(directory) as served:
        common = ("generate", *prompt, "--endpoint", served.endpoint)
        plain = tsqp_here(capsys, *common)
        trusting = tsqp_here(capsys, *common, "--trusted-weights", str(file), "--trusted-digest", done.out.strip())
        assert (trusting.code, trusting.out) == (0, plain.out)
        refused = tsqp_here(capsys, *common, "--trusted-weights", str(file))
        assert refused.code == 1
        assert "tsqp: trusted_weights needs trusted_digest" in refused.err
        monkeypatch.setenv("TSQP_TRUSTED_DIGEST", done.out.strip())
        timed = tsqp_here(
            capsys,
            "prefill",
            "--tokens",
            "8",
            "--repeat",
            "1",
            "--endpoint",
            served.endpoint,
            "--trusted-weights",
            str(file),
        )
        assert timed.code == 0, timed.err


@pytest.mark.parametrize(
    ("arguments", "fragments", "code"),
    [
        (("trust",), ("--out", "tsqp trust --help"), 2),
        (("trust", "--out", "x", "--model", "/nowhere"), ("/nowhere does not exist",), 1),
        (("trust", "--out", "/nowhere/x"), ("/nowhere/x can't be written",), 1),
        (("generate", "--prompt", "x", "--trusted-digest", "sha256:0"), ("without trusted_weights",), 1),
        (("generate", "--prompt", "x", "--trusted-weights", "x", "--trusted-digest", "0"), ("64 hexadecimal",), 1),
        (("prefill", "--trusted-weights", "x", "--placement", "local"), ("'local' asks no server",), 1),
    ],
)
def test_what_goes_wrong_is_one_sentence(
    arguments: tuple[str, ...], fragments: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = tsqp_here(capsys, *arguments)
    assert outcome.code == code
    assert outcome.out == ""
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("tsqp: ")
    assert all(fragment in last for fragment in fragments), last
