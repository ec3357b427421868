"""Errors around a prompt: none of their texts, at either end, says what it is. Lengths and shapes may appear."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from canaries import Search, as_tensor, canary_ids, canary_words, messages
from commands import tsqp_here
from models import make_model, serving
from transformers import PreTrainedModel

from tsqp import cli_parts, demo
from tsqp.cli_parts import check_prompt, one_line, usage_text
from tsqp.client import GPUClient
from tsqp.errors import (
    ClosedError,
    ConfigError,
    ModelError,
    PeerDiedError,
    RemoteError,
    WaitTimeoutError,
)
from tsqp.server import GPUServer
from tsqp.split import from_pretrained

VOCAB = 60000
#: Always the same: a number in a message that is one of them is no accident then.
IDS = canary_ids(24, 20000, VOCAB, seed=11)
REMOTE = ["linear", "ops", "fused", "layer"]


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return make_model("llama", vocab_size=VOCAB, num_hidden_layers=1)


@pytest.fixture(scope="module")
def server(stock: PreTrainedModel) -> Iterator[GPUServer]:
    with serving(stock, kv_limit_bytes=16 << 10) as server:
        yield server


def split(server: GPUServer, placement: str, keep: bool, **options: Any) -> PreTrainedModel:
    return from_pretrained(endpoint=server.endpoint, placement=placement, keep_embedding=keep, **options)


def forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids)


def an_id_beyond_the_vocabulary(model: PreTrainedModel) -> None:
    forward(model, as_tensor([*IDS, 65001]))


def a_negative_id(model: PreTrainedModel) -> None:
    forward(model, -as_tensor(IDS))


def ids_that_are_numbers(model: PreTrainedModel) -> None:
    forward(model, as_tensor(IDS).to(torch.float64))


def a_mask_of_another_length(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(as_tensor(IDS), attention_mask=torch.ones(1, 3, 5, 7, dtype=torch.bool))


def a_timeout(model: PreTrainedModel) -> None:
    model.tsqp_client.timeout = 1e-9
    try:
        forward(model, as_tensor(IDS))
    finally:
        model.tsqp_client.timeout = 30.0


def training(model: PreTrainedModel) -> None:
    model.train()
    try:
        forward(model, as_tensor(IDS))
    finally:
        model.eval()


def a_closed_model(model: PreTrainedModel) -> None:
    model.close()
    forward(model, as_tensor(IDS))


FAULTS: list[tuple[Callable[[PreTrainedModel], None], tuple[type[BaseException], ...]]] = [
    (an_id_beyond_the_vocabulary, (RemoteError, IndexError)),
    (a_negative_id, (RemoteError, IndexError)),
    (ids_that_are_numbers, (RuntimeError, RemoteError)),
    (a_mask_of_another_length, (RuntimeError, ModelError)),
    (a_timeout, (WaitTimeoutError,)),
    (training, (ModelError,)),
    (a_closed_model, (ClosedError,)),
]


@pytest.mark.parametrize("keep", [False, True], ids=["sent", "kept"])
@pytest.mark.parametrize("placement", REMOTE)
def test_faults_of_a_forward(
    placement: str, keep: bool, server: GPUServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    search = Search([*IDS, 65001])
    model = split(server, placement, keep)
    for fault, kinds in FAULTS:
        if fault is ids_that_are_numbers and not keep:
            continue  # rounded to integers, and answered
        with pytest.raises(kinds) as caught:
            fault(model)
        assert messages(caught.value).strip()
        assert search.in_text(messages(caught.value)) == set(), fault.__name__
    model.close()
    printed = capfd.readouterr()
    for text in (caplog.text, printed.out, printed.err):
        assert search.in_text(text) == set()


@pytest.mark.parametrize("placement", ["ops", "fused", "layer"])
def test_a_prompt_for_which_there_is_no_room(placement: str, server: GPUServer) -> None:
    model = split(server, placement, keep=True)
    with pytest.raises(RemoteError, match=r"need \d+ bytes") as caught:
        model.generate(as_tensor(IDS * 8), max_new_tokens=4)
    assert Search(IDS).in_text(messages(caught.value)) == set()
    model.close()


@pytest.mark.parametrize("keep", [False, True], ids=["sent", "kept"])
def test_a_server_that_goes_in_the_middle(keep: bool, stock: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made: list[int] = []
    with serving(stock) as server:

        class Stopping:
            """A streamer that stops the server after three tokens."""

            def put(self, tokens: torch.Tensor) -> None:
                made.extend(tokens.flatten().tolist())
                if len(made) == len(IDS) + 3:
                    server.stop()

            def end(self) -> None: ...

        model = split(server, "linear", keep)
        with pytest.raises((PeerDiedError, ClosedError)) as caught:
            model.generate(as_tensor(IDS), max_new_tokens=16, do_sample=False, streamer=Stopping())
        model.close()
    search = Search(made)
    assert search.in_text(messages(caught.value)) == set()
    assert search.in_text(caplog.text) == set()


def test_a_log_that_cannot_be_written_and_a_reply_that_has_no_form(server: GPUServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="performance log") as caught:
        split(server, "ops", keep=True, perf_log=tmp_path / "no" / "log")
    assert Search(IDS).in_text(messages(caught.value)) == set()
    with GPUClient(server.endpoint) as client, pytest.raises(RemoteError, match="9 dimensions") as refused:
        client.embedding(as_tensor(IDS).reshape(1, 1, 1, 1, 1, 1, 1, 24))
    assert Search(IDS).in_text(messages(refused.value)) == set()


# --- the commands ----------------------------------------------------------------------------------------------


def test_a_token_the_model_does_not_know(stock: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="a token beyond the 60000 that the model knows") as caught:
        check_prompt(as_tensor([*IDS, 65001]), stock, "/models/other")
    assert Search([*IDS, 65001]).in_text(messages(caught.value)) == set()


WORD = canary_words(1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "And", WORD),
        (WORD,),
        ("--prompt", WORD, "--threads", "no number"),
        ("--prompt", "--threads", WORD),
        ("--prompt", "And", "--threads", WORD),
        ("--prompt", "And", f"--seed={WORD}"),
        ("--prompt", WORD, "--seed", "4"),
        ("--prompt", WORD, "--placement", "nowhere"),
        ("--prompt", WORD, "--sample", "--temperature", "-1"),
        ("--prompt", WORD, "--model", "/nowhere"),
        ("--prompt", WORD, "--endpoint", "nowhere"),
        ("--prompt", WORD, "--endpoint", "ipc:///nowhere/x.sock"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_wrong_options_do_not_repeat_a_prompt(
    command: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsqp.cli_parts._CONNECT_TIMEOUT_S", 0.2)
    done = tsqp_here(capsys, command, *arguments)
    assert done.code in (1, 2)
    assert WORD not in done.out + done.err
    assert done.err.startswith("tsqp: ")
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("quoting", ["{value!r} is not a valid integer.", "Got unexpected extra argument ({value})"])
def test_usage_errors_of_any_typer_do_not_repeat_a_prompt(quoting: str) -> None:
    command = click.Command("generate", params=[click.Option(["--prompt"]), click.Option(["--threads"])])
    other = click.Command("top", params=[click.Option(["--once"])])
    argv, text = ["generate", "--prompt", "And", f"--threads={WORD}", WORD], quoting.format(value=WORD)
    hidden = usage_text(click.UsageError(text, click.Context(command)), text, argv)
    assert WORD not in hidden
    assert usage_text(click.UsageError(text, click.Context(other)), text, argv) == text


@pytest.mark.parametrize("fault", [RuntimeError("boom"), UnicodeEncodeError("ascii", f"{WORD} \xe4", 10, 11, "no")])
def test_an_unexpected_error_does_not_repeat_the_prompt(
    fault: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(cli_parts, "check_prompt", fail)
    done = tsqp_here(capsys, "generate", "--prompt", f"{WORD} \xe4", "--placement", "local")
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(f"tsqp: unexpected {type(fault).__name__}: ")
    assert "'tsqp --debug' in front shows where" in done.err
    assert WORD not in done.out + done.err
    assert "\xe4" not in done.err
    assert "\\xe4" not in done.err


def test_one_line_quotes_no_character_that_could_not_be_written() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "a\udc80".encode()
    assert "udc80" in str(caught.value)
    assert "udc80" not in one_line(caught.value)
    assert one_line(ValueError("a\nb")) == "a b"


def test_the_text_goes_to_the_standard_output_only(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        done = tsqp_here(capsys, "generate", "--prompt", demo.PROMPT, "--placement", "local", "--max-new-tokens", "8")
    assert out.getvalue().startswith(demo.PROMPT)
    assert len(out.getvalue()) > len(demo.PROMPT) + 8
    assert not set(out.getvalue().split()) & set(done.err.split())
