"""What must not be where it does not belong: prompts, token ids and keys, in shared memory, logs, the server's memory.

Each search is shown to find what it looks for: without ``keep_embedding`` the ids are there.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq.auth
from canaries import Search, as_tensor, canary_ids, canary_words
from commands import Served, serving, short_directory, tsqp, tsqp_here
from transformers import AutoTokenizer, PreTrainedModel
from zmq.utils import z85

from tsqp import demo, from_pretrained
from tsqp.client import GPUClient

pytestmark = pytest.mark.watchdog(180)

REMOTE = ["linear", "ops", "fused", "layer"]
#: Ids of the embedded model that are no number seen everywhere else (its vocabulary is 2048).
LOW, HIGH = 1024, 2048
NEW_TOKENS = 12
#: Small, as all of it is looked at after every message: the next one may be written over it.
GEOMETRY = ("--max-chunk-bytes", str(128 << 10), "--max-chunks", "4")


@dataclass
class Watched:
    """A server process, and the searches whose finds must not be in what it prints."""

    served: Served
    searches: list[Search] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.served.process.pid


@pytest.fixture(scope="module")
def server() -> Iterator[Watched]:
    """``tsqp serve`` on the embedded model in a process of its own, figures on show; its output is searched."""
    with short_directory() as directory, serving(directory, *GEOMETRY, "--status") as served:
        watched = Watched(served)
        yield watched
        outcome = served.stop()
        assert "client gone" in outcome.err
        for search in watched.searches:
            assert search.in_rows(outcome.out) == search.in_rows(outcome.err) == set()


@contextmanager
def open_segment() -> Iterator[int]:
    """A descriptor of the one segment this process has mapped; it stays readable when both ends are gone."""
    gc.collect()  # a model that was closed keeps its segment mapped until it is collected
    links = {link: _target(link) for link in Path("/proc/self/fd").iterdir()}
    found = [link for link, target in links.items() if re.search(r"/tsqp-[0-9a-f]{32}( \(deleted\))?$", target)]
    assert len(found) == 1
    descriptor = os.open(found[0], os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""  # it was the directory's own


def contents(segment: int) -> bytes:
    return os.pread(segment, os.fstat(segment).st_size, 0)


def forward(
    client: GPUClient, segment: int, placement: str, ids: list[int], **options: Any
) -> tuple[PreTrainedModel, bytes]:
    """A split model that was given a prompt; and what was in the segment, after each of the requests."""
    seen: list[bytes] = []
    ask = client.ask

    def watched(call: Any) -> Any:
        result = ask(call)
        seen.append(contents(segment))
        return result

    client.ask = client._run = watched
    with torch.no_grad():
        model = from_pretrained(demo.model_path(), client=client, placement=placement, **options)
        before = len(seen)
        model(as_tensor(ids))
    assert len(seen) - before == model.tsqp_placement.round_trips(model.config.num_hidden_layers)
    client.ask = client._run = ask
    return model, b"".join(seen)


def in_server(search: Search, server: Watched) -> set[str]:
    """What is found in the server's memory; skips, and says so, where the machine does not let the test look."""
    try:
        return search.in_process(server.pid)
    except PermissionError:
        pytest.skip("this machine does not let a test read the server's memory; all before this was looked at")


@pytest.mark.parametrize("placement", REMOTE)
def test_kept_ids_are_nowhere_at_the_server(
    placement: str, server: Watched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, ids = tmp_path / "rows.jsonl", canary_ids(24, LOW, HIGH)
    caplog.set_level(logging.INFO)
    with GPUClient(server.served.endpoint, perf_log=log) as client, open_segment() as segment:
        model, seen = forward(client, segment, placement, ids, keep_embedding=True)
        assert Search(ids).in_bytes(seen) == set()
        torch.manual_seed(ids[0])
        made = model.generate(as_tensor(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=True)
        search = Search(made[0].tolist())
        server.searches.append(search)
        shown = [repr(client.stats), repr(client.server_stats()), caplog.text]
        held = in_server(search, server)
        client.close()
        assert search.in_bytes(contents(segment)) == set()
    assert held == set()
    assert "stays in the runner" in caplog.text
    assert search.in_bytes(log.read_bytes()) == set()
    for text in (*shown, log.read_text()):
        assert search.in_rows(text) == set()


def test_sent_ids_are_found_so_that_the_search_can_fail(server: Watched) -> None:
    ids = canary_ids(24, LOW, HIGH)
    search = Search(ids)
    with GPUClient(server.served.endpoint) as client, open_segment() as segment:
        assert search.in_bytes(forward(client, segment, "linear", ids)[1]) == {"8-byte ids"}
        client.embedding(as_tensor(ids))
        held = in_server(search, server)
        client.close()
        # Nobody wipes a slot: its pages are the kernel's to clear before somebody else gets them.
        assert search.in_bytes(contents(segment)) == {"8-byte ids"}
    assert held == {"8-byte ids"}


def test_the_search_finds_what_it_looks_for() -> None:
    ids, text = canary_ids(24, LOW, HIGH), canary_words(3)
    search = Search(ids, [text])
    for nbytes in (2, 4, 8):
        for shift in range(8):
            run_of_four = b"".join(number.to_bytes(nbytes, "little") for number in ids[shift : shift + 4])
            assert search.in_bytes(bytes(64 + shift) + run_of_four + bytes(64)) == {f"{nbytes}-byte ids"}
            assert search.in_bytes(bytes(64 + shift) + run_of_four[:-nbytes] + bytes(64)) == set()
    assert search.in_bytes(b"x" + text.encode()) == {"utf-8 text"}
    assert search.in_bytes(b"x" + text.encode("utf-16")) == {"utf-16-le text"}
    assert search.in_text(f"no {text}") == {"text"}
    assert search.in_text(f"token {ids[3]} is odd") == {"ids"}
    assert search.in_text("1.2345 and 0x1234") == set()
    assert search.in_rows(f"1, {str(ids[4:8])[1:-1]}, 2") == {"ids"}
    assert search.in_rows(str(ids[4:7])) == set()


def test_a_prompt_typed_at_the_command_line(
    server: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompt and answer as text and as ids: on the runner's standard output only."""
    prompt, log = canary_words(4), tmp_path / "rows.log"
    options = ["--model", demo.model_path(), "--endpoint", server.served.endpoint, "--keep-embedding"]
    options += ["--sample", "--seed", "3", "--max-new-tokens", "24", "--stats"]
    done = tsqp("generate", "--prompt", prompt, *options, "--perf-log", str(log))
    assert done.code == 0
    assert done.out.startswith(prompt)
    answer = done.out.removeprefix(prompt).strip()
    assert len(answer) > 32
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path(), local_files_only=True)
    # Shorter pieces of an answer are common words, which other texts have, too.
    pieces = [answer[first : first + 32] for first in range(0, len(answer) - 31, 8)]
    search = Search(tokenizer(prompt + answer)["input_ids"], [*prompt.split(), *pieces])
    server.searches.append(search)
    assert search.in_rows(done.err) == search.in_rows(log.read_text()) == set()
    assert search.in_bytes(log.read_bytes()) == set()
    status = tsqp_here(capsys, "top", "--endpoint", server.served.endpoint, "--once", "--json")
    assert status.code == 0
    assert search.in_rows(status.out) == set()
    assert in_server(search, server) == set()


def test_a_secret_key_is_nowhere_but_at_its_owner(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tsqp.curve", reason="this tsqp has no CURVE keys")
    tmp_path.chmod(0o700)
    (tmp_path / "clients").mkdir(mode=0o700)
    (server_public, server_secret), (own_public, own_secret) = (
        zmq.auth.create_certificates(tmp_path, name) for name in ("server", "runner")
    )
    for public, secret in ((server_public, server_secret), (own_public, own_secret)):
        os.chmod(secret, 0o600)
        os.chmod(public, 0o644)
    shutil.copy(own_public, tmp_path / "clients")
    own, theirs = (zmq.auth.load_certificate(path)[1] for path in (own_secret, server_secret))
    search, control = (Search(keys=[z85.decode(key)], texts=[key.decode()]) for key in (own, theirs))
    keys = ("--curve-key", server_secret, "--curve-clients", str(tmp_path / "clients"))
    log = tmp_path / "rows.jsonl"
    caplog.set_level(logging.DEBUG)
    with short_directory() as directory, serving(directory, *GEOMETRY, *keys) as served:
        options: dict[str, Any] = {"curve_key": own_secret, "curve_server": server_public, "perf_log": log}
        with GPUClient(served.endpoint, **options) as client, open_segment() as segment:
            client.ping()
            assert search.in_bytes(contents(segment)) == control.in_bytes(contents(segment)) == set()
            assert search.in_text(repr(client.stats) + repr(vars(client))) == set()
            held = [in_server(each, Watched(served)) for each in (search, control)]
        outcome = served.stop()
    assert held[0] == set()
    assert held[1] >= {"key"}  # it has its own, so the search can fail
    printed = capfd.readouterr()
    for text in (outcome.out, outcome.err, caplog.text, printed.out, printed.err, log.read_text()):
        assert search.in_text(text) == control.in_text(text) == set()
