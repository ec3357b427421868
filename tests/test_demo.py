"""The embedded model, the script that trains it, and ``tsqp demo`` as a newcomer runs it."""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import finish, processes_naming, serving, short_directory, start, tsqp, tsqp_here, wait_for
from models import make_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsqp import cli
from tsqp.demo import PROMPT, compare, model_path
from tsqp.demo.compare import Comparison, Generated
from tsqp.errors import TsqpError
from tsqp.placement import get_placement

pytestmark = pytest.mark.watchdog(180)
LAYERS = 5
COMMON_WORDS = """
    a all also am an and are art as be because before behold but by came children come day days did do done
    earth every father fire for from go god great had hand hath have he heard heart her him his house i if
    in into is israel it king know land let lord made man many me men my name not now of on one or our out
    own peace people place put said saith saying servant servants shall she so son sons spake spirit take
    that the thee their them then there these they thine thing things this thou thy to took unto up upon us
    was water we went were when which who will with word words ye you your
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32, local_files_only=True)


# --- the model ----------------------------------------------------------------------------------------------


def test_model_is_small_and_exercises_what_it_should(model: torch.nn.Module) -> None:
    weights = Path(model_path(), "model.safetensors")
    assert weights.stat().st_size <= 3_000_000
    with safe_open(weights, "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["original_max_position_embeddings"] < config.max_position_embeddings
    assert config.num_hidden_layers == LAYERS
    assert not model.model.rotary_emb.inv_freq.equal(unscaled_frequencies(config))


def unscaled_frequencies(config: object) -> torch.Tensor:
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim  # type: ignore[attr-defined]
    return config.rope_parameters["rope_theta"] ** -exponents  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["And God said,", "Zürich 3.14 ∑ \n\ttabs", "", "日本語 🙂"])
def test_tokenizer_encodes_any_text(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads_on_the_left(tokenizer) -> None:
    batch = tokenizer(["And", "And God said unto them"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.pad_token_id
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]


def loss_of(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_model_prefers_sentences_to_word_salad(model, tokenizer) -> None:
    sentence = "And the man went out of the city, and told the people all that he had seen."
    salad = "seen all city the And, told that out he and people. the had man of the went"
    assert loss_of(model, tokenizer, sentence) + 1 < loss_of(model, tokenizer, salad)
    assert loss_of(model, tokenizer, sentence) < 4


def test_model_speaks_in_words_and_sentences(model, tokenizer) -> None:
    common = set(COMMON_WORDS.split())
    texts = []
    for prompt in (PROMPT, "In the beginning", "Then came the people"):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    assert len(words) > 90
    assert sum(word in common for word in words) / len(words) > 0.6, texts
    assert sum(mark in ".,;:" for mark in " ".join(texts)) >= 5, texts


# --- its training script ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    path = Path(__file__).parent.parent / "tools" / "train_demo.py"
    spec = importlib.util.spec_from_file_location("train_demo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_demo"]


def test_training_is_reproducible(training: ModuleType, tmp_path: Path) -> None:
    lines = [f"Gen{c}:{v} And the {w} said unto {v} men, Go forth." for c in (1, 2) for v, w in enumerate("abcdefgh")]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines * 40))
    recipe = training.Recipe(vocab_size=280, hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1)
    recipe = replace(recipe, batch=2, steps=3, held_out=0.4)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        training.run(text, tmp_path / out, replace(recipe, seed=seed))
    first, again, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert first == again
    assert first != other
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a", local_files_only=True)
    assert tokenizer.decode(tokenizer("the a said")["input_ids"], skip_special_tokens=True) == "the a said"


def test_chapters_lose_their_references(training: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ge1:1 In the beginning.\nGe1:2 And the earth.\n1Sa2:1 And Hannah prayed.\n")
    assert training.read_chapters(text) == ["In the beginning.\nAnd the earth.\n", "And Hannah prayed.\n"]
    text.write_text("one sentence\nanother\n\na second part\n")
    assert training.read_chapters(text) == ["one sentence\nanother\n", "a second part\n"]


# --- tsqp demo ----------------------------------------------------------------------------------------------


def facts_of(out: str) -> dict[str, str]:
    """The labelled lines of the demo's output."""
    labels = (
        "tokens",
        "logits",
        "round trips",
        "ring",
        "ZeroMQ",
        "transport",
        "placement",
        "time",
        "protection:",
    )
    return {
        label: line[len(label) :].strip() for line in out.splitlines() for label in labels if line.startswith(label)
    }


@pytest.mark.parametrize(("placement", "trips"), [("ops", 6 * LAYERS + 2), ("linear", 4 * LAYERS + 2), ("local", 0)])
def test_demo(directory: Path, placement: str, trips: int) -> None:
    outcome = tsqp("demo", "--placement", placement, "--max-new-tokens", "16", TMPDIR=str(directory))
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    assert outcome.out.startswith(PROMPT)
    facts = facts_of(outcome.out)
    assert facts["tokens"] == "16 new, equal to those of stock transformers in one process"
    difference, relative = (float(number) for number in re.findall(r"\d\.\de[+-]\d\d", facts["logits"]))
    assert relative <= difference
    assert relative <= 1e-4
    prompt_tokens = re.fullmatch(rf"{trips} for the prefill of (\d+) tokens, {trips} per token", facts["round trips"])
    assert prompt_tokens, facts["round trips"]
    # One prefill that is only counted, then one prefill and 15 tokens; a message each way; and the Init call.
    messages = 2 * (17 * trips + (1 if trips else 0))
    assert facts["ring"].startswith(f"{messages} messages"), facts
    assert facts["ZeroMQ"].startswith("0 messages")
    assert facts["protection:"] == "none — activations are visible to the GPU host"
    assert list(directory.iterdir()) == []
    assert processes_naming(str(directory)) == []


def test_demo_takes_a_prompt(directory: Path) -> None:
    outcome = tsqp("demo", "--prompt", "Blessed are", "--max-new-tokens", "1", TMPDIR=str(directory))
    assert outcome.code == 0
    assert outcome.out.startswith("Blessed are")
    assert "1 new, equal to" in outcome.out


def test_demo_uses_a_running_server(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(directory) as server:
        for placement in ("linear", "layer"):
            options = ("--endpoint", server.endpoint, "--placement", placement, "--max-new-tokens", "4")
            outcome = tsqp_here(capsys, "demo", *options)
            assert outcome.code == 0, outcome
            assert outcome.out.startswith(PROMPT)
            facts = facts_of(outcome.out)
            assert facts["tokens"] == "4 new, equal to those of stock transformers in one process"
            assert facts["transport"] == "shm+ipc"
        assert server.process.poll() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "bfloat16"), "computes in bfloat16, and the demo compares with float32; start it with"),
        (("--model", "OTHER"), "the server does not serve this model"),
    ],
)
def test_demo_refuses_a_server_of_something_else(
    directory: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "OTHER" in arguments:
        make_model("llama", directory / "other")
    given = [str(directory / "other") if argument == "OTHER" else argument for argument in arguments]
    with serving(directory, *given) as server:
        outcome = tsqp_here(capsys, "demo", "--endpoint", server.endpoint)
    assert outcome.code == 1
    assert message in outcome.err, outcome.err


def test_demo_without_a_server_takes_no_endpoint(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = tsqp_here(capsys, "demo", "--placement", "local", "--endpoint", "ipc:///tmp/x")
    assert outcome.code == 1
    assert "--endpoint has no effect on placement local" in outcome.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_demo_stopped_by_a_signal_stops_its_server(directory: Path, number: int, code: int) -> None:
    process = start("demo", "--max-new-tokens", "900", TMPDIR=str(directory))
    wait_for(lambda: processes_naming(str(directory)) or process.poll() is not None, "the demo's server")
    process.send_signal(number)
    outcome = finish(process)
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    assert list(directory.iterdir()) == []
    assert processes_naming(str(directory)) == []


def test_demo_reports_a_server_that_does_not_start(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr("tempfile.tempdir", None)
    with (
        compare.ServerProcess(str(directory / "no-model")) as server,
        pytest.raises(TsqpError, match="no-model does not exist"),
    ):
        server.connect()
    assert list(directory.iterdir()) == []


def comparison(split: list[int], stock: list[int], difference: float = 0.0) -> Comparison:
    """A comparison of two made-up runs after a prompt of one token."""
    logits = torch.arange(12.0).view(3, 4)
    runs = [Generated(torch.tensor([1, *ids]), logits, 1.0) for ids in (split, stock)]
    runs[0] = replace(runs[0], logits=logits + torch.tensor([[0.0], [difference], [100 * difference]]))
    return Comparison(get_placement("ops"), "text", 1, *runs, prefill_trips=32, total_trips=96)


def test_comparison_judges_tokens_and_logits() -> None:
    same = comparison([7, 8, 9], [7, 8, 9], 0.5)
    assert same.tokens_equal
    assert same.max_abs_diff == 50
    assert same.logit_scale == 11
    other = comparison([7, 3, 9], [7, 8, 9], 0.5)
    assert not other.tokens_equal
    assert other.max_abs_diff == 0.5  # the third step saw another second token


def test_demo_fails_where_tokens_differ(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compare, "run_demo", lambda *_: comparison([7, 3, 9], [7, 8, 9]))
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo"])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "DIFFERENT from" in printed.out
    assert printed.err.startswith("tsqp: the split model's tokens differ")
