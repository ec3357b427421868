"""``tsqp run``: the text of ``tsqp generate`` from a small process, and one sentence for each thing that goes wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer.main
from commands import LIMIT_S, Outcome, Served, environment, finish, run_here, serving, short_directory, tsqp_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsqp import prompts, run
from tsqp.cli import app
from tsqp.demo import model_path
from tsqp.errors import ConfigError
from tsqp.run_options import OPTIONS, flag

pytestmark = pytest.mark.watchdog(180)

PROMPT = "And the king said unto"
TOKENS = 12
#: The command as it is typed; what it loaded and started is written to the file REPORT when it ends.
WATCHED = """if True:
    import json, os, sys
    started = []
    starting = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.spawn", "os.system"}
    sys.addaudithook(lambda event, values: started.append(event) if event in starting else None)
    from tsqp.__main__ import main
    try:
        main()
    finally:
        loaded = [name for name, module in sys.modules.items() if module is not None]
        with open(os.environ["REPORT"], "w") as file:
            json.dump({"modules": loaded, "started": started}, file)
"""
#: Modules (and all below them) that no runner needs.
NEEDLESS = (
    *("rich", "typer", "click", "pygments", "matplotlib", "PIL", "jinja2", "scipy", "sklearn", "pandas", "networkx"),
    *("sympy", "mpmath", "triton", "torch._inductor", "torch.onnx", "torch.distributed.tensor"),
    *("torch.distributed.fsdp", "torch.utils.tensorboard", "accelerate", "prometheus_client"),
)
#: Modules of tsqp that belong to the server, or to a person at a terminal, by the beginning of their names.
OTHERS = (
    *("server", "serving", "answering", "batching", "hub", "listener", "turns", "loading", "linear_backends"),
    *("session", "layer_cache", "cuda", "compiling", "in_slot", "local_server", "overview", "metrics", "top"),
    *("report_", "analyze", "perf_read", "doctor", "demo.", "prefill", "health", "benchmarks"),
)
#: Of these names, what a runner has all the same: durations that a server's reply tells.
OURS = ("tsqp.server_times",)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with short_directory() as path, serving(path) as served:
        yield served


@pytest.fixture(scope="module")
def text() -> str:
    """What stock transformers, in one process, makes of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return PROMPT + tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def running(*arguments: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A ``tsqp run`` with pipes for all that it reads and writes; killed where the test did not end it."""
    command = [sys.executable, "-c", WATCHED, "run", *arguments]
    pipe = subprocess.PIPE
    with short_directory() as directory:
        env = {"REPORT": str(directory / "report"), **env}
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(**env))
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            finish(process)


def ask(process: subprocess.Popen[bytes], prompt: str) -> str:
    """Writes a line to a process that answers with texts that a zero byte ends; returns the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{prompt}\n".encode())
    process.stdin.flush()
    read = b""
    while not read.endswith(b"\0"):
        piece = os.read(process.stdout.fileno(), 1 << 16)
        assert piece, finish(process)
        read += piece
    return read.removesuffix(b"\0").decode()


def assert_sentence(outcome: Outcome, *fragments: str, code: int) -> None:
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("tsqp: ")
    assert outcome.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in outcome.err


# --- a small process ---------------------------------------------------------------------------------------------


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.parametrize(
    ("placement", "threads", "expected"),
    [("local", 1, 1), ("linear", 1, 3), ("ops", 2, 5), ("fused", 1, 3), ("layer", 1, 3)],
)
def test_text_of_stock_from_a_small_process(
    server: Served, text: str, tmp_path: Path, placement: str, threads: int, expected: int
) -> None:
    """2 N + 1 threads at most: torch's and the operators' N each, the main thread being in both, and ZeroMQ's two."""
    options = ("--lines", "--null", "--placement", placement, "--threads", str(threads), "--dtype", "float32")
    arguments = (*options, "--max-new-tokens", str(TOKENS), "--endpoint", server.endpoint)
    report = tmp_path / "report"
    with running(*arguments, REPORT=str(report)) as process:
        assert ask(process, PROMPT) == text
        assert ask(process, "") == ""
        many = f"{PROMPT} " * 60  # the operators' own threads come with long prompts
        assert ask(process, many).startswith(many)
        assert ask(process, PROMPT) == text
        alive = threads_of(process.pid)
        outcome = finish(process)  # which ends its input
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert alive == expected if threads == 1 else 3 < alive <= expected
    loaded = json.loads(report.read_text())
    assert loaded["started"] == []
    assert {"tsqp.run", "tsqp.split", "torch", "transformers"} <= set(loaded["modules"])
    assert needless(loaded["modules"]) == []


def needless(modules: list[str]) -> list[str]:
    """Those of ``modules`` that a runner does without."""
    found = [name for name in modules if any(name == one or name.startswith(f"{one}.") for one in NEEDLESS)]
    others = tuple(f"tsqp.{name}" for name in OTHERS)
    found += [name for name in modules if name.startswith(others) and name not in OURS]
    found += [name for name in modules if name == "tsqp.cli" or name.startswith("tsqp.cli_")]
    found = [name for name in found if name != "tsqp.cli_parts"]
    compiler = [name for name in modules if name.startswith("torch._dynamo")]
    return found + [name for name in compiler if name != "torch._dynamo._trace_wrapped_higher_order_op"]


def test_the_list_names_what_the_other_commands_load() -> None:
    """The names above are modules that exist, or the test would find nothing for ever."""
    there = {path.stem for path in Path(run.__file__).parent.glob("*.py")} | {"demo.compare", "benchmarks"}
    assert all(any(name.startswith(one) for name in there) for one in OTHERS)
    assert needless(["tsqp.hub", "tsqp.report_html", "torch._dynamo.eval_frame", "rich.table", "tsqp.cli_options"])
    assert needless(["tsqp.run", "tsqp.client", "tsqp.server_times", "torch", "tsqp.demo"]) == []


def test_a_file_in_and_a_file_out(server: Served, text: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(f"{PROMPT}\n")
    files = ("--prompt-file", str(tmp_path / "prompt"), "--output", str(tmp_path / "answer"), "--answer-only")
    logged = ("--stats", "--perf-log", str(tmp_path / "log.csv"), "--threads", "1", "--timeout", "60")
    arguments = (*files, *logged, "--max-new-tokens", str(TOKENS), "--endpoint", server.endpoint)
    with running(*arguments, REPORT=str(tmp_path / "report")) as process:
        outcome = finish(process)
    assert (outcome.code, outcome.out) == (0, ""), outcome
    assert (tmp_path / "answer").read_text() == text.removeprefix(PROMPT) + "\n"
    for word in ("gpu_linear", "tee_softmax", "BatchLinear"):
        assert word in outcome.err
    assert PROMPT not in outcome.err
    assert len((tmp_path / "log.csv").read_text().splitlines()) > TOKENS
    loaded = json.loads((tmp_path / "report").read_text())
    assert (loaded["started"], needless(loaded["modules"])) == ([], [])


# --- the same command, however it is called ----------------------------------------------------------------------


def test_same_text_as_generate(server: Served, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--endpoint", server.endpoint)
    outcomes = [
        tsqp_here(capsys, "generate", *arguments),
        run_here(capsys, *arguments),
        tsqp_here(capsys, "run", *arguments),
    ]
    assert [(one.code, one.out, one.err) for one in outcomes] == [(0, f"{text}\n", "")] * 3
    sampled = [*arguments, "--sample", "--temperature", "1.3", "--seed", "3"]
    assert run_here(capsys, *sampled).out == tsqp_here(capsys, "generate", *sampled).out


def test_one_table_of_options() -> None:
    """``tsqp generate``, ``tsqp run`` by typer (the documentation's) and by argparse say the same."""
    commands = typer.main.get_command(app).commands
    generate = {one.name: one for one in commands["generate"].params}
    listed = {one.name: one for one in commands["run"].params}
    assert list(OPTIONS) == list(listed)
    assert set(generate) <= set(listed)
    for name, option in generate.items():
        assert option.help == listed[name].help == OPTIONS[name].help
        assert option.opts == listed[name].opts == [flag(name)]
        if name != "prompt":  # without one `run` reads the standard input
            assert option.default == listed[name].default == OPTIONS[name].default


@pytest.mark.parametrize("words", [("-m", "tsqp", "run"), ("-m", "tsqp.run"), ("-m", "tsqp", "--debug", "run")])
def test_help(words: tuple[str, ...]) -> None:
    command = [sys.executable, *words, "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example: " in done.stdout
    assert all(flag(name) in done.stdout for name in OPTIONS)


# --- prompts -----------------------------------------------------------------------------------------------------


class Input(io.BytesIO):
    """A standard input."""

    @property
    def buffer(self) -> Input:
        return self


@pytest.mark.parametrize(
    ("given", "lines", "expected"),
    [
        (b"one two", False, ["one two"]),
        (b"one\ntwo\n", False, ["one\ntwo"]),
        (b"one\r\n", False, ["one"]),
        (b"\n\n", False, ["\n"]),
        (b"", False, [""]),
        (b"one\n\ntwo", True, ["one", "", "two"]),
        (b"", True, []),
        ("Grüße\n".encode(), True, ["Grüße"]),
    ],
)
def test_prompts(
    given: bytes, lines: bool, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (None, "-", str(tmp_path / "file")):
        monkeypatch.setattr(sys, "stdin", Input(given))
        (tmp_path / "file").write_bytes(given)
        assert list(prompts.read_prompts(None, source, lines)) == expected


def test_a_prompt_that_is_too_long_or_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT_BYTES", 1 << 20)
    for given, said in ((b"x" * ((1 << 20) + 1), "longer than 1 MiB"), (b"king\xff", "not UTF-8 at byte 4")):
        for lines in (False, True):
            monkeypatch.setattr(sys, "stdin", Input(given))
            with pytest.raises(ConfigError, match=said) as caught:
                list(prompts.read_prompts(None, None, lines))
            assert "king" not in str(caught.value)


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments", "code"),
    [
        (("--bogus",), ("No such option: --bogus", "tsqp run --help"), 2),
        (("--prompt", "secret", "words"), ("1 words belong to no option",), 2),
        (("--prompt",), ("--prompt", "tsqp run --help"), 2),
        (("--max-new-tokens", "0"), ("--max-new-tokens", "less than 1"), 2),
        (("--max-new-tokens", "many"), ("--max-new-tokens", "whole number"), 2),
        (("--temperature", "hot"), ("--temperature", "not a number"), 2),
        (("--timeout", "nan"), ("--timeout",), 2),
        (("--threads", "0"), ("--threads",), 2),
        (("--seed", "-1"), ("--seed",), 2),
        (("--prompt", "secret", "--prompt-file", "-"), ("--prompt ", "--prompt-file"), 1),
        (("--prompt", "secret", "--lines"), ("--prompt ", "--lines"), 1),
        (("--prompt-file", "/nowhere/prompt"), ("/nowhere/prompt", "No such file"), 1),
        (("--prompt", "secret", "--output", "/nowhere/out"), ("/nowhere/out", "No such file"), 1),
        (("--prompt", "secret", "--model", "/nowhere"), ("/nowhere does not exist",), 1),
        (("--prompt", "secret", "--endpoint", "tcp://localhost:5"), ("numeric address",), 1),
        (("--prompt", "secret", "--placement", "moon"), ("'moon'", "local, linear, ops"), 1),
        (("--prompt", "secret", "--dtype", "int3"), ("'int3'", "float16"), 1),
        (("--prompt", "secret", "--seed", "2"), ("--seed", "--sample"), 1),
        (("--prompt", "secret", "--endpoint", "ipc:///tmp/tsqp-nobody.sock"), ("ipc:///tmp/tsqp-nobody.sock",), 1),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...], fragments: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_here(capsys, *arguments)
    assert_sentence(outcome, *fragments, code=code)
    assert "secret" not in outcome.err
    assert "words'" not in outcome.err


def test_the_unexpected_does_not_repeat_the_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(run, "load_tokenizer", fail)
    arguments = ("--prompt", PROMPT, "--placement", "local")
    assert_sentence(run_here(capsys, *arguments), "unexpected RuntimeError: it broke", "tsqp --debug run", code=1)
    assert PROMPT not in run_here(capsys, *arguments).err
    with pytest.raises(RuntimeError, match="it broke"):
        run.main([*arguments, "--debug"])


def test_without_a_server_nothing_else_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is typed most often: the environment says where, the standard input is the prompt."""
    monkeypatch.setenv("LLAMA_IPC_PATH", f"{tmp_path}/nobody.sock")
    monkeypatch.setattr(sys, "stdin", Input(PROMPT.encode()))
    assert_sentence(run_here(capsys), f"{tmp_path}/nobody.sock", code=1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it(server: Served, number: int, code: int) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "900", "--endpoint", server.endpoint, "--threads", "1")
    with running(*arguments) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(number)
        outcome = finish(process)
    assert (outcome.code, outcome.err) == (code, "")


def test_the_reader_leaves(server: Served) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "900", "--endpoint", server.endpoint, "--threads", "1")
    with running(*arguments) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        process.stdout = None
        outcome = finish(process)
    assert (outcome.code, outcome.err) == (1, "")
