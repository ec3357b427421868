"""The commands as a user meets them: help, results, and one sentence for each thing that can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Outcome, Served, environment, finish, serving, short_directory, start, tsqp, tsqp_here, wait_for

from tsqp import ShmRingBuffer
from tsqp.demo import model_path

pytestmark = pytest.mark.watchdog(180)

COMMANDS = {
    "serve": (
        "--model",
        "--endpoint",
        "--device",
        "--dtype",
        "--max-chunk-bytes",
        "--max-chunks",
        "--max-clients",
    ),
    "generate": (
        "--prompt",
        "--max-new-tokens",
        "--placement",
        "--sample",
        "--temperature",
        "--seed",
        "--wire-dtype",
        "--trusted-weights",
        "--trusted-digest",
    ),
    "prefill": ("--tokens", "--placement", "--repeat", "--model", "--endpoint"),
    "demo": ("--prompt", "--max-new-tokens", "--placement"),
    "clean": ("--yes",),
    "trust": ("--out", "--model", "--embedding"),
    "health": ("--endpoint", "--timeout", "--json"),
    "doctor": ("--no-echo", "--json"),
    "top": ("--endpoint", "--interval", "--once", "--json"),
    "analyze": ("LOG...", "--compare", "--top", "--json", "--csv", "--plot", "--forward", "--trace"),
}
PROMPT = "And the king said unto"


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with short_directory() as path, serving(path) as served:
        yield served


def assert_one_sentence(outcome: Outcome, *fragments: str, code: int = 1) -> None:
    """A failed command printed one line, with these fragments, on the standard error."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.out + outcome.err
    lines = outcome.err.strip().splitlines()
    assert lines, outcome
    assert lines[-1].startswith("tsqp: "), outcome.err
    for fragment in fragments:
        assert fragment in lines[-1]


def assert_only_sentence(outcome: Outcome, *fragments: str, code: int = 1) -> None:
    """As above, and nothing else was printed anywhere."""
    assert_one_sentence(outcome, *fragments, code=code)
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert outcome.out == ""


# --- help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(arguments: tuple[str, ...]) -> None:
    outcome = tsqp(*arguments)
    assert outcome.code == 0
    assert all(f" {command} " in outcome.out for command in COMMANDS)
    assert "tsqp demo" in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_options_and_an_example(command: str) -> None:
    outcome = tsqp(command, "--help")
    assert outcome.code == 0
    assert f"Example: tsqp {command}" in outcome.out
    for option in COMMANDS[command]:
        assert option in outcome.out


def test_version() -> None:
    from tsqp import __version__

    assert tsqp("--version").out == f"tsqp {__version__}\n"


def test_command_line_loads_torch_late_and_sets_the_wait_policy() -> None:
    code = "import sys, os, tsqp.cli; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    env = environment()
    del env["OMP_WAIT_POLICY"]
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "passive"]


def test_installed_script_is_the_module() -> None:
    script = shutil.which("tsqp", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("tsqp is not installed beside this interpreter")
    out = subprocess.run([script, "--version"], env=environment(), capture_output=True, text=True, check=True)
    assert out.stdout == tsqp("--version").out


# --- what goes wrong before anything is loaded --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments", "code"),
    [
        (("bogus",), ("No such command 'bogus'", "tsqp --help"), 2),
        (("serve", "--bogus"), ("--bogus", "tsqp serve --help"), 2),
        (("generate",), ("--prompt", "tsqp generate --help"), 2),
        (("generate", "--prompt", "x", "--max-new-tokens", "0"), ("--max-new-tokens",), 2),
        (("prefill", "--tokens", "many"), ("--tokens",), 2),
        (("prefill", "--repeat", "0"), ("--repeat",), 2),
        (("serve", "--threads", "0"), ("--threads",), 2),
        (("serve", "--max-chunk-bytes", "63"), ("--max-chunk-bytes", "64"), 2),
        (("serve", "--max-chunks", "1025"), ("--max-chunks", "1024"), 2),
        (("serve", "--model", "/nowhere/model"), ("/nowhere/model does not exist", "checkpoint"), 1),
        (("generate", "--prompt", "x", "--model", "/"), ("/ holds no config.json", "checkpoint"), 1),
        (("prefill", "--model", "/nowhere"), ("/nowhere does not exist",), 1),
        (("serve", "--endpoint", "server.sock"), ("'server.sock'", "ipc:///path"), 1),
        (("serve", "--endpoint", f"ipc:///{'x' * 120}"), ("107", "shorter path"), 1),
        (("generate", "--prompt", "x", "--endpoint", "tcp://localhost:5"), ("numeric address",), 1),
        (("generate", "--prompt", "x", "--placement", "moon"), ("'moon'", "local, linear, ops"), 1),
        (("demo", "--placement", "moon"), ("'moon'", "local, linear, ops"), 1),
        (("generate", "--prompt", "x", "--temperature", "2"), ("--temperature", "--sample"), 1),
        (("generate", "--prompt", "x", "--seed", "2"), ("--seed", "--sample"), 1),
        (("generate", "--prompt", "x", "--sample", "--temperature", "0"), ("--temperature 0", "above 0"), 1),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], fragments: tuple[str, ...], code: int) -> None:
    assert_only_sentence(tsqp(*arguments), *fragments, code=code)


def test_debug_shows_the_traceback() -> None:
    outcome = tsqp("--debug", "serve", "--model", "/nowhere/model")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "ModelNotFoundError" in outcome.err


# --- what goes wrong later ----------------------------------------------------------------------------------


def test_missing_server(directory: Path) -> None:
    outcome = tsqp("generate", "--prompt", "x", LLAMA_IPC_PATH=f"{directory}/nobody.sock")
    assert_only_sentence(outcome, f"ipc://{directory}/nobody.sock")


def test_unknown_dtype_and_device(directory: Path) -> None:
    endpoint = f"ipc://{directory}/server.sock"
    assert_one_sentence(tsqp("serve", "--endpoint", endpoint, "--dtype", "int3"), "int3", "bfloat16")
    assert_one_sentence(tsqp("serve", "--endpoint", endpoint, "--device", "toaster"), "toaster", "cpu")


def test_unknown_dtype_of_the_runner(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--dtype", "--wire-dtype"):
        assert_only_sentence(tsqp_here(capsys, "generate", "--prompt", "x", option, "int3"), "'int3'", "float16")


def test_broken_checkpoint(directory: Path) -> None:
    shutil.copytree(model_path(), directory / "model", ignore=shutil.ignore_patterns("*.py", "__*"))
    weights = directory / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    outcome = tsqp("serve", "--model", str(weights.parent), "--endpoint", f"ipc://{directory}/server.sock")
    assert_one_sentence(outcome, str(weights.parent), "can't be loaded")


def test_environment_gives_defaults(directory: Path) -> None:
    assert_only_sentence(tsqp("serve", LLAMA_MODEL_PATH="/nowhere/model"), "/nowhere/model does not exist")
    outcome = tsqp("serve", LLAMA_IPC_PATH=f"{directory}/a.sock", TSQP_SHM_MAX_CHUNKS="ten")
    assert_one_sentence(outcome, "TSQP_SHM_MAX_CHUNKS='ten'")


def test_busy_endpoint(server: Served) -> None:
    outcome = tsqp("serve", "--endpoint", server.endpoint)
    assert_one_sentence(outcome, str(server.socket))
    assert tsqp("prefill", "--tokens", "4", "--repeat", "1", "--endpoint", server.endpoint).code == 0


def test_full_shared_memory(directory: Path) -> None:
    """A ring no machine has room for: whichever end notices, somebody is told what to do."""
    endpoint = f"ipc://{directory}/server.sock"
    process = start("serve", "--endpoint", endpoint, "--max-chunk-bytes", str(1 << 39), "--threads", "1")
    try:
        wait_for(lambda: process.poll() is not None or (directory / "server.sock").exists(), "the server's start")
        if process.poll() is None:
            told = tsqp("prefill", "--tokens", "4", "--repeat", "1", "--endpoint", endpoint)
            process.terminate()
            finish(process)
        else:
            told = finish(process)
    finally:
        if process.poll() is None:
            process.kill()
            finish(process)
    assert_one_sentence(told, "shm")


def test_server_of_another_model(server: Served, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model_path(), directory / "other", ignore=shutil.ignore_patterns("*.safetensors", "*.py", "__*"))
    path = directory / "other" / "config.json"
    config = json.loads(path.read_text()) | {"hidden_size": 64, "head_dim": 16}
    path.write_text(json.dumps(config))
    outcome = tsqp_here(capsys, "generate", "--prompt", "x", "--model", str(path.parent), "--endpoint", server.endpoint)
    assert_only_sentence(outcome, "does not serve this model")


def test_checkpoint_without_tokenizer(server: Served, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(Path(model_path(), "config.json"), directory)
    outcome = tsqp_here(capsys, "generate", "--prompt", "x", "--model", str(directory), "--endpoint", server.endpoint)
    assert_one_sentence(outcome, "tokenizer", str(directory))


def test_more_tokens_than_positions(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = tsqp_here(capsys, "prefill", "--tokens", "5000", "--endpoint", server.endpoint)
    assert_only_sentence(outcome, "5000", "1024")


# --- results ------------------------------------------------------------------------------------------------


def test_generate_is_the_same_in_every_placement(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--max-new-tokens", "12", "--dtype", "float32")
    texts = {
        p: tsqp_here(capsys, *arguments, "--placement", p, "--endpoint", server.endpoint)
        for p in ("local", "linear", "ops", "fused", "layer")
    }
    assert all(outcome.code == 0 for outcome in texts.values()), texts
    assert len({outcome.out for outcome in texts.values()}) == 1, texts
    text = texts["ops"].out
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 12
    assert text.endswith("\n")
    assert all(outcome.err == "" for outcome in texts.values())


def test_generate_streams(server: Served) -> None:
    process = start("generate", "--prompt", PROMPT, "--max-new-tokens", "400", "--endpoint", server.endpoint)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1 << 16).decode()
    assert PROMPT.startswith(first) or first.startswith(PROMPT)
    pieces = 0
    while os.read(process.stdout.fileno(), 1 << 16):
        pieces += 1
    assert finish(process).code == 0
    assert pieces > 1


def test_sampling_is_repeatable_with_a_seed(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--endpoint", server.endpoint)
    sampling = ("--sample", "--temperature", "1.3", "--seed")
    first, again, other = (tsqp_here(capsys, *arguments, *sampling, seed).out for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_statistics_of_the_runner(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "--prompt", PROMPT, "--max-new-tokens", "4", "--endpoint", server.endpoint)
    outcome = tsqp_here(capsys, *arguments, "--wire-dtype", "bfloat16", "--stats")
    assert outcome.code == 0
    assert "gpu_linear" in outcome.err
    assert "tee_softmax" in outcome.err
    assert "BatchLinear" in outcome.err
    assert "gpu_linear" not in outcome.out


@pytest.mark.parametrize(
    ("placement", "trips"),
    [("ops", 6 * 5 + 2), ("linear", 4 * 5 + 2), ("fused", 2 * 5 + 2), ("layer", 5 + 2), ("local", 0)],
)
def test_prefill(server: Served, placement: str, trips: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tokens", "40", "--repeat", "3", "--placement", placement, "--endpoint", server.endpoint)
    outcome = tsqp_here(capsys, "prefill", *arguments)
    assert outcome.code == 0, outcome
    facts = dict(line.split(maxsplit=1) for line in outcome.out.replace("round trips", "trips").splitlines())
    assert facts["prefill"] == f"40 tokens, placement {placement}, 3 runs"
    assert facts["trips"] == f"{trips} per prefill"
    assert facts["median"].endswith(" tokens/s")
    assert facts["min"].endswith(" tokens/s")
    assert facts["ring"].startswith(f"{2 * trips} messages")
    assert facts["ZeroMQ"].startswith("0 messages")


# --- signals, pipes, leftovers ------------------------------------------------------------------------------


def segments_in(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir() if entry.name.startswith("tsqp")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_statistics(directory: Path, shm_directory: Path, number: int) -> None:
    before = segments_in(shm_directory)
    with serving(directory) as served:
        assert tsqp("prefill", "--tokens", "4", "--repeat", "1", "--endpoint", served.endpoint).code == 0
        outcome = served.stop(number)
    assert outcome.code == 0, outcome
    assert "Traceback" not in outcome.err
    assert "protection: none" in outcome.err
    for word in ("transport", "shared memory", "ZeroMQ", "BatchLinear", "gpu_linear"):
        assert word in outcome.out
    assert list(directory.iterdir()) == []
    assert segments_in(shm_directory) <= before


def test_ctrl_c_while_generating(server: Served) -> None:
    process = start("generate", "--prompt", PROMPT, "--max-new-tokens", "900", "--endpoint", server.endpoint)
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert tsqp("prefill", "--tokens", "4", "--repeat", "1", "--endpoint", server.endpoint).code == 0


def test_reader_of_the_output_leaves(server: Served) -> None:
    process = start("generate", "--prompt", PROMPT, "--max-new-tokens", "900", "--endpoint", server.endpoint)
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    process.stdout = None
    outcome = finish(process)
    assert outcome.code != 0
    assert outcome.err == ""


def test_server_killed_while_generating(directory: Path) -> None:
    with serving(directory) as served:
        process = start("generate", "--prompt", PROMPT, "--max-new-tokens", "900", "--endpoint", served.endpoint)
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        served.stop(signal.SIGKILL)
        outcome = finish(process)
    assert_one_sentence(outcome)
    tsqp("clean", "--yes")


def test_clean_lists_then_removes(shm_directory: Path) -> None:
    """A process that dies with a ring open leaves its segment; that of a live one is not touched."""
    alive = ShmRingBuffer(4096, 2)
    code = "import os, tsqp\nring = tsqp.ShmRingBuffer(4096, 2)\nprint(ring.name, flush=True)\nos._exit(1)"
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    name = out.stdout.strip()
    assert name in segments_in(shm_directory), out
    listed = tsqp("clean")
    assert listed.code == 0
    assert name in listed.out
    assert "tsqp clean --yes" in listed.out
    assert name in segments_in(shm_directory)
    removed = tsqp("clean", "--yes")
    assert removed.code == 0
    assert "bytes freed" in removed.out
    assert name not in segments_in(shm_directory)
    assert tsqp("clean").out == "nothing left behind\n"
    assert alive.name in segments_in(shm_directory)
    alive.close()
