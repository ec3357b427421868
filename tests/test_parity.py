"""A split model computes what the stock model computes: logits, tokens, caches, masks, precision, round
trips.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, left_padded, make_model, serving, token_ids
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
    set_seed,
)

from tsqp.client import GPUClient
from tsqp.placement import PLACEMENTS
from tsqp.split import from_pretrained

REMOTE = ["linear", "ops", "fused", "layer"]
#: Greatest difference of logits allowed in float32, relative to the largest logit.
TOLERANCE = 1e-4


@dataclass
class Served:
    """A stock model and the endpoint of a server of its copy."""

    family: str
    stock: PreTrainedModel
    endpoint: str

    def split(self, placement: str, **options: Any) -> PreTrainedModel:
        return from_pretrained(endpoint=self.endpoint, placement=placement, **options)


@pytest.fixture(scope="module", params=list(FAMILIES))
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    stock = make_model(request.param)
    with serving(stock) as server:
        yield Served(request.param, stock, server.endpoint)


@pytest.fixture(scope="module")
def llama() -> Iterator[Served]:
    stock = make_model("llama")
    with serving(stock) as server:
        yield Served("llama", stock, server.endpoint)


@pytest.fixture(params=REMOTE)
def placement(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def split(served: Served, placement: str) -> Iterator[PreTrainedModel]:
    model = served.split(placement)
    yield model
    model.close()


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def assert_parity(found: Tensor, expected: Tensor) -> None:
    assert relative_error(found, expected) <= TOLERANCE


# --- one forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 17, 200])
def test_logits(length: int, split: PreTrainedModel, served: Served) -> None:
    ids = token_ids(1, length)
    assert_parity(logits(split, input_ids=ids), logits(served.stock, input_ids=ids))


def test_logits_with_left_padding(split: PreTrainedModel, served: Served) -> None:
    inputs = left_padded([4, 23, 11])
    real = inputs["attention_mask"].bool()
    assert_parity(logits(split, **inputs)[real], logits(served.stock, **inputs)[real])


def test_padding_changes_nothing(split: PreTrainedModel) -> None:
    inputs = left_padded([4, 23, 11])
    batch = logits(split, **inputs)
    for row, length in enumerate((4, 23, 11)):
        alone = logits(split, input_ids=inputs["input_ids"][row : row + 1, -length:])
        assert_parity(batch[row : row + 1, -length:], alone)


def test_a_future_token_changes_nothing_before_it(split: PreTrainedModel) -> None:
    ids = token_ids(2, 20)
    changed = ids.clone()
    changed[:, 13] = (ids[:, 13] + 7) % 90 + 3
    before, after = logits(split, input_ids=ids), logits(split, input_ids=changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert relative_error(before[:, 13], after[:, 13]) > 0.05
    assert relative_error(before[:, 14:], after[:, 14:]) > 0.01


def test_an_earlier_token_reaches_the_last_logits(split: PreTrainedModel, served: Served) -> None:
    ids = token_ids(1, 12)
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 7) % 90 + 3
    assert relative_error(logits(split, input_ids=changed)[:, -1], logits(split, input_ids=ids)[:, -1]) > 1e-3


@pytest.mark.parametrize("form", ["bool", "float"])
def test_own_masks(form: str, split: PreTrainedModel, served: Served) -> None:
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[5:, 2] = False  # the later ones do not see the third
    mask = visible[None, None]
    if form == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids = token_ids(1, 9)
    found = logits(split, input_ids=ids, attention_mask=mask)
    assert_parity(found, logits(served.stock, input_ids=ids, attention_mask=mask))
    assert relative_error(found, logits(split, input_ids=ids)) > 1e-3


def test_hidden_states_and_attentions(split: PreTrainedModel, served: Served, placement: str) -> None:
    ids = token_ids(1, 9)
    with torch.no_grad():
        found = split(ids, output_hidden_states=True, output_attentions=placement == "ops")
        expected = served.stock(ids, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_parity(ours, theirs)
    if placement == "ops":
        assert all(torch.allclose(probs.sum(-1), torch.ones(1, 4, 9)) for probs in found.attentions)


# --- generation ---------------------------------------------------------------------------------------------


def assert_same_tokens(split: PreTrainedModel, stock: PreTrainedModel, inputs: Any, **options: Any) -> Tensor:
    options = {"do_sample": False, **options}
    set_seed(5)
    expected = stock.generate(**inputs, **options)
    set_seed(5)
    found = split.generate(**inputs, **options)
    assert torch.equal(found, expected)
    return found


@pytest.mark.parametrize("length", [1, 2, 17, 200])
def test_greedy_tokens(length: int, split: PreTrainedModel, served: Served) -> None:
    count = 64 if length == 17 else 8
    inputs = {"input_ids": token_ids(1, length)}
    tokens = assert_same_tokens(split, served.stock, inputs, max_new_tokens=count)
    assert tokens.shape[1] == length + count
    if count == 64:
        assert len(set(tokens[0, length:].tolist())) > 8  # no collapse into one token


def test_greedy_tokens_of_a_left_padded_batch(split: PreTrainedModel, served: Served) -> None:
    assert_same_tokens(split, served.stock, left_padded([3, 21, 9]), max_new_tokens=64)


def test_beams(split: PreTrainedModel, served: Served) -> None:
    assert_same_tokens(split, served.stock, left_padded([3, 12]), max_new_tokens=20, num_beams=4)


def test_sampling_with_the_same_seed(split: PreTrainedModel, served: Served) -> None:
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "num_return_sequences": 2}
    inputs = {"input_ids": token_ids(1, 7)}
    tokens = assert_same_tokens(split, served.stock, inputs, max_new_tokens=40, **options)
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_other_caches(options: dict[str, Any], split: PreTrainedModel, served: Served) -> None:
    assert_same_tokens(split, served.stock, left_padded([5, 9]), max_new_tokens=24, **options)


def test_assisted_generation_rolls_back(split: PreTrainedModel, served: Served) -> None:
    inputs = {"input_ids": token_ids(1, 4).repeat(1, 3)}
    assert_same_tokens(split, served.stock, inputs, max_new_tokens=32, prompt_lookup_num_tokens=3)


def test_streamer_from_a_thread(split: PreTrainedModel, served: Served) -> None:
    class Digits:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f"{int(token)} " for token in ids)

    inputs = {"input_ids": token_ids(1, 6)}
    streamer = TextIteratorStreamer(Digits(), skip_prompt=True, timeout=60)
    options = {**inputs, "max_new_tokens": 12, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=split.generate, kwargs=options)
    thread.start()
    streamed = "".join(streamer).split()
    thread.join()
    expected = served.stock.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert [int(word) for word in streamed] == expected[0, 6:].tolist()


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1] * 24, [20, 1, 1, 1, 1], [5, 7, 12], [17, 7]], ids=str)
def test_pieces_equal_the_whole(pieces: list[int], split: PreTrainedModel, served: Served) -> None:
    ids = token_ids(2, 24)
    cache, found, start = DynamicCache(config=split.config), [], 0
    with torch.no_grad():
        for count in pieces:
            found.append(split(ids[:, start : start + count], past_key_values=cache).logits)
            start += count
    assert_parity(torch.cat(found, dim=1), logits(served.stock, input_ids=ids))


def test_a_returned_cache_continues(split: PreTrainedModel, served: Served) -> None:
    inputs = {"input_ids": token_ids(1, 10)}
    first = split.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    logits(split, input_ids=token_ids(1, 5, seed=9))  # something else in between
    found = split.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, served.stock.generate(**inputs, max_new_tokens=12, do_sample=False))


# --- round trips and bytes ----------------------------------------------------------------------------------


def test_round_trips_are_exactly_those_of_the_placement(split: PreTrainedModel, placement: str) -> None:
    client = split.tsqp_client
    expected = {"linear": 4, "ops": 6, "fused": 2, "layer": 1}[placement] * LAYERS + 2
    assert expected == PLACEMENTS[placement].round_trips(LAYERS)
    cache = DynamicCache(config=split.config)
    with torch.no_grad():
        for count in (19, 1, 1, 4, 1):
            before = client.round_trips
            split(token_ids(3, count), past_key_values=cache)
            assert client.round_trips - before == expected


def test_generation_takes_one_forward_of_round_trips_per_token(split: PreTrainedModel, placement: str) -> None:
    client = split.tsqp_client
    before = client.round_trips
    split.generate(token_ids(1, 5), max_new_tokens=10, do_sample=False)
    assert client.round_trips - before == 10 * PLACEMENTS[placement].round_trips(LAYERS)


def test_keys_and_values_never_travel_twice(served: Served) -> None:
    split = served.split("ops")
    client, config, cache = split.tsqp_client, split.config, DynamicCache(config=split.config)
    sent = {}
    with torch.no_grad():
        split(token_ids(1, 40), past_key_values=cache)
        for length in range(41, 141):
            before = client.stats["sent_bytes"]
            split(token_ids(1, 1), past_key_values=cache)
            sent[length] = client.stats["sent_bytes"] - before
    split.close()
    # What grows with the context is one row of probabilities per head: never K and V, which would be far
    # more.
    window = getattr(config, "sliding_window", None) or 10**9
    grown = min(140, window) - min(41, window)
    probabilities = LAYERS * config.num_attention_heads * grown * 4
    alignment = LAYERS * 64
    assert probabilities - alignment <= sent[140] - sent[41] <= probabilities + alignment


def test_beams_send_only_new_keys_and_values(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    split = llama.split("ops")
    client, positions = split.tsqp_client, []
    ask = client.attention_scores

    def recorded(layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        positions.append((k.shape[2], v.shape[2]))
        return ask(layer, q, k, v, **options)

    monkeypatch.setattr(client, "attention_scores", recorded)
    split.generate(**left_padded([5, 12]), max_new_tokens=8, num_beams=3, do_sample=False)
    split.close()
    assert positions == [(12, 12)] * LAYERS + [(1, 1)] * LAYERS * 7


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_models_are_as_exact_as_stock(dtype: torch.dtype, placement: str) -> None:
    exact = make_model("llama")
    stock = make_model("llama", dtype=dtype)
    inputs = left_padded([4, 30])
    real = inputs["attention_mask"].bool()
    with serving(stock) as server:
        split = from_pretrained(endpoint=server.endpoint, placement=placement)
        assert split.dtype == dtype
        found = logits(split, **inputs)
        split.close()
    assert found.dtype == dtype
    reference = logits(exact, **inputs)[real]
    error, stock_error = (relative_error(each[real], reference) for each in (found, logits(stock, **inputs)))
    assert error <= 2 * stock_error


def test_a_float32_runner_of_a_bfloat16_server(placement: str) -> None:
    stock = make_model("llama", dtype=torch.bfloat16)
    with serving(stock) as server:
        split = from_pretrained(endpoint=server.endpoint, placement=placement, dtype="float32")
        assert split.dtype == torch.float32
        assert split.get_input_embeddings()(token_ids(1, 3)).dtype == torch.float32
        found = logits(split, input_ids=token_ids(1, 30))
        split.close()
    assert found.dtype == torch.float32
    assert relative_error(found, logits(make_model("llama"), input_ids=token_ids(1, 30))) <= 0.05


#: Greatest difference of logits with a float32 model at both ends, relative to the largest logit (see
#: ``tsqp.from_pretrained``).
WIRE_ERRORS = {"auto": TOLERANCE, "float32": TOLERANCE, "float16": 0.005, "bfloat16": 0.04}


@pytest.mark.parametrize("wire_dtype", WIRE_ERRORS)
def test_wire_precision(wire_dtype: str, split: PreTrainedModel, served: Served, placement: str) -> None:
    narrow = served.split(placement, wire_dtype=wire_dtype)
    inputs = left_padded([6, 40])
    real = inputs["attention_mask"].bool()
    found = logits(narrow, **inputs)[real]
    narrow.close()
    assert found.dtype == torch.float32
    error = relative_error(found, logits(served.stock, **inputs)[real])
    assert error <= WIRE_ERRORS[wire_dtype]
    if wire_dtype in ("float16", "bfloat16"):
        assert error > TOLERANCE  # it really is narrower


def test_a_narrow_wire_halves_the_bytes(llama: Served, placement: str) -> None:
    sent = {}
    # Rotary tables are no activations: they go once per forward, in the dtype of the runner.
    tables = 2 * 200 * 12 * 4 if placement in ("fused", "layer") else 0
    for wire_dtype in ("float32", "bfloat16"):
        split = llama.split(placement, wire_dtype=wire_dtype)
        before = split.tsqp_client.stats["sent_bytes"]
        logits(split, input_ids=token_ids(1, 200))
        sent[wire_dtype] = split.tsqp_client.stats["sent_bytes"] - before - tables
        split.close()
    assert 0.45 <= sent["bfloat16"] / sent["float32"] <= 0.55


# --- a checkpoint on disk, and pipelines --------------------------------------------------------------------


def test_a_checkpoint_served_and_split_by_path(tmp_path: Path, placement: str) -> None:
    stock = make_model("qwen3", tmp_path)
    stock.generation_config.repetition_penalty = 1.3
    stock.generation_config.save_pretrained(tmp_path)
    from tsqp.server import GPUServer

    with GPUServer(tmp_path, f"ipc://{tmp_path}/s.sock", device="cpu", max_chunk_bytes=1 << 20) as server:
        for path in (tmp_path, None):
            split = from_pretrained(path, server.endpoint, placement=placement)
            assert_parity(logits(split, input_ids=token_ids(1, 30)), logits(stock, input_ids=token_ids(1, 30)))
            inputs = {"input_ids": token_ids(1, 30)}
            assert split.generation_config.repetition_penalty == 1.3
            assert_same_tokens(split, stock, inputs, max_new_tokens=16)
            split.close()


def test_a_text_generation_pipeline(split: PreTrainedModel, served: Served) -> None:
    vocabulary = {f"w{number}": number for number in range(97)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w2", padding_side="left")
    prompts = ["w5 w17 w9", "w11 w30 w4 w8 w80"]
    answers = [
        pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
            prompts, batch_size=2, max_new_tokens=10, do_sample=False
        )
        for model in (split, served.stock)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0][0]["generated_text"].count("w") > 3 + 5  # special ones are left out


def test_two_runners_at_once_do_not_disturb_each_other(llama: Served) -> None:
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        with GPUClient(llama.endpoint) as client:
            split = from_pretrained(client=client, placement=REMOTE[number % 4])
            found[number] = split.generate(token_ids(1, 8, seed=number), max_new_tokens=16, do_sample=False)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        expected = llama.stock.generate(token_ids(1, 8, seed=number), max_new_tokens=16, do_sample=False)
        assert torch.equal(found[number], expected)
