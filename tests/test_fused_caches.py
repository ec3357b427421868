"""Caches whose K and V are on the server (placements fused and layer) behave as those of the stock model: copied,
alternating, cropped, reordered, repeated, reset; and what can't be served is said.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import LAYERS, assert_same, logits, make_model, serving, token_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from tsqp.client import GPUClient
from tsqp.errors import ConfigError, ModelError, RemoteError
from tsqp.protocol import Status
from tsqp.server import GPUServer
from tsqp.split import from_pretrained

PLACEMENTS = ["fused", "layer"]
#: Full attention with scaled rotary tables; a sliding window of 16; both kinds of layers in one model.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def served(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, GPUServer]]:
    stock = make_model(request.param, **FAMILIES[request.param])
    with serving(stock) as server:
        yield stock, server


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[PreTrainedModel, GPUServer]]:
    stock = make_model("llama")
    with serving(stock) as server:
        yield stock, server


@pytest.fixture(params=PLACEMENTS)
def placement(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def split(llama: tuple[PreTrainedModel, GPUServer], placement: str) -> Iterator[PreTrainedModel]:
    model = from_pretrained(endpoint=llama[1].endpoint, placement=placement)
    yield model
    model.close()


def forward(model: PreTrainedModel, cache: Any, *shape: int, seed: int = 1) -> Tensor:
    return logits(model, input_ids=token_ids(*shape, seed=seed), past_key_values=cache)


def dynamic(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


# --- what users do with caches: each is played on the split and on the stock model ------------------------------


def copies_of_a_prefix(model: PreTrainedModel) -> Iterator[Tensor]:
    prefix = dynamic(model)
    yield forward(model, prefix, 1, 21)
    first, second = copy.deepcopy(prefix), copy.deepcopy(prefix)
    yield forward(model, first, 1, 5, seed=2)
    yield forward(model, prefix, 1, 3, seed=3)
    yield forward(model, second, 1, 1, seed=4)
    third = copy.deepcopy(first)
    for seed in range(5, 9):
        for cache in (second, third, first, prefix):
            yield forward(model, cache, 1, 1, seed=seed)


def a_copy_of_what_is_rolled_back(model: PreTrainedModel) -> Iterator[Tensor]:
    cache = dynamic(model)
    yield forward(model, cache, 2, 7)
    kept = copy.deepcopy(cache)
    cache.crop(-4)
    yield forward(model, cache, 2, 6, seed=2)
    yield forward(model, kept, 2, 2, seed=3)
    yield forward(model, cache, 2, 1, seed=4)


def caches_in_turn(model: PreTrainedModel) -> Iterator[Tensor]:
    caches = [dynamic(model) for _ in range(3)]
    for number, cache in enumerate(caches):
        yield forward(model, cache, number + 1, 5 + number, seed=number)
    for step in range(14):
        for number, cache in enumerate(caches):
            yield forward(model, cache, number + 1, 1 + step % 2, seed=10 * number + step)


def a_cache_cropped_again_and_again(model: PreTrainedModel) -> Iterator[Tensor]:
    cache = dynamic(model)
    for layer in cache.layers:
        if layer.is_sliding:
            layer.activate_past_recording()  # else transformers itself can't crop it
    yield forward(model, cache, 1, 6)
    for step in range(1, 5):
        cache.crop(-step)
        yield forward(model, cache, 1, step + 1, seed=step)
    yield forward(model, cache, 1, 12, seed=9)


def rows_reordered_repeated_and_selected(model: PreTrainedModel) -> Iterator[Tensor]:
    cache = dynamic(model)
    yield forward(model, cache, 3, 9)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    yield forward(model, cache, 3, 1, seed=2)
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    yield forward(model, cache, 3, 12, seed=3)
    cache.batch_repeat_interleave(2)
    yield forward(model, cache, 6, 1, seed=4)
    cache.batch_select_indices(torch.tensor([5, 0]))
    yield forward(model, cache, 2, 2, seed=5)
    yield forward(model, cache, 2, 1, seed=6)


def a_cache_used_afresh(model: PreTrainedModel) -> Iterator[Tensor]:
    cache = dynamic(model)
    yield forward(model, cache, 2, 9)
    cache.reset()
    yield forward(model, cache, 1, 4, seed=2)
    yield forward(model, cache, 1, 1, seed=3)


def static_caches_in_turn(model: PreTrainedModel) -> Iterator[Tensor]:
    caches = [StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
    for cache in caches:
        yield forward(model, cache, 2, 6, seed=1)
    for step in range(14):
        for number, cache in enumerate(caches):
            yield forward(model, cache, 2, 1 + (step == 2), seed=2 * step + number)
    caches[0].reset()
    yield forward(model, caches[0], 2, 3, seed=3)
    yield forward(model, caches[0], 2, 1, seed=4)


def a_cache_without_a_config(model: PreTrainedModel) -> Iterator[Tensor]:
    cache = DynamicCache()
    yield forward(model, cache, 1, 5)
    yield forward(model, cache, 1, 1, seed=2)
    yield forward(model, None, 2, 6)
    yield forward(model, cache, 1, 2, seed=3)


SCENES = [
    copies_of_a_prefix,
    caches_in_turn,
    rows_reordered_repeated_and_selected,
    a_cache_used_afresh,
    static_caches_in_turn,
    a_cache_without_a_config,
    a_copy_of_what_is_rolled_back,
    a_cache_cropped_again_and_again,
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_caches_do_what_stock_ones_do(
    scene: Callable[[PreTrainedModel], Iterator[Tensor]], served: tuple[PreTrainedModel, GPUServer], placement: str
) -> None:
    stock, server = served
    with GPUClient(server.endpoint) as client:
        split = from_pretrained(client=client, placement=placement)
        for found, expected in zip(scene(split), scene(stock), strict=True):
            assert_same(found, expected)


def test_two_models_share_a_client(llama: tuple[PreTrainedModel, GPUServer]) -> None:
    stock, server = llama
    with GPUClient(server.endpoint) as client:
        models = [from_pretrained(client=client, placement=placement) for placement in (*PLACEMENTS, "ops")]
        scenes = [caches_in_turn(model) for model in models]
        for expected in caches_in_turn(stock):
            for scene in scenes:
                assert_same(next(scene), expected)


# --- memory on the server ---------------------------------------------------------------------------------------


def test_a_cache_is_forgotten_with_the_next_request_after_it_is_gone(split: PreTrainedModel) -> None:
    client = split.tsqp_client
    kept = dynamic(split)
    forward(split, kept, 1, 4)
    one = client.server_stats()["kv_bytes"]
    cache = dynamic(split)
    forward(split, cache, 1, 100)
    assert client.server_stats()["kv_bytes"] > one
    twin = copy.deepcopy(cache)
    forward(split, twin, 1, 1)
    assert client.server_stats()["kv_bytes"] < 3 * one + 2 * 2 * 150 * 2 * 24 * 4  # the storage is shared
    del cache, twin
    gc.collect()
    forward(split, kept, 1, 1)
    assert client.server_stats()["kv_bytes"] == one


def test_a_closed_connection_leaves_nothing(llama: tuple[PreTrainedModel, GPUServer], placement: str) -> None:
    server = llama[1]
    split = from_pretrained(endpoint=server.endpoint, placement=placement)
    cache = dynamic(split)
    forward(split, cache, 1, 50)
    assert server.stats["kv_bytes"] > 0
    split.close()
    with GPUClient(server.endpoint) as client:
        for _ in range(200):
            client.ping()
            if server.stats["kv_bytes"] == 0:
                break
    assert server.stats["kv_bytes"] == 0


def test_storage_grows_by_parts_and_not_by_positions(split: PreTrainedModel) -> None:
    cache, sizes = dynamic(split), set()
    forward(split, cache, 1, 10)
    for step in range(150):
        forward(split, cache, 1, 1, seed=step)
        sizes.add(split.tsqp_client.server_stats()["kv_bytes"])
    assert len(sizes) <= 4


def test_requests_of_a_decode_step_do_not_grow(split: PreTrainedModel) -> None:
    client, cache, sent = split.tsqp_client, dynamic(split), set()
    forward(split, cache, 1, 30)
    for step in range(100):
        before = client.stats["sent_bytes"]
        forward(split, cache, 1, 1, seed=step)
        sent.add(client.stats["sent_bytes"] - before)
    assert len(sent) == 1


def test_the_limit_is_an_error_of_one_client_and_changes_nothing(placement: str) -> None:
    stock = make_model("llama")
    position = LAYERS * 2 * 2 * 12 * 4  # layers, K and V, kv heads, elements, bytes
    with (
        serving(stock, kv_limit_bytes=100 * position + 4000) as server,
        GPUClient(server.endpoint) as client,
        GPUClient(server.endpoint) as another,
    ):
        split, other = (from_pretrained(client=each, placement=placement) for each in (client, another))
        cache, theirs, expected = dynamic(split), dynamic(other), dynamic(stock)
        forward(split, cache, 1, 60)
        forward(other, theirs, 1, 40)
        for words in ("K/V limit", "K/V limit"):
            with pytest.raises(RemoteError, match=words) as caught:
                forward(split, cache, 1, 70, seed=2)
            assert caught.value.code == Status.LIMIT
            assert cache.get_seq_length() == 60
        forward(stock, expected, 1, 60)
        assert_same(forward(split, cache, 1, 8, seed=3), forward(stock, expected, 1, 8, seed=3))
        assert_same(forward(split, cache, 1, 1, seed=4), forward(stock, expected, 1, 1, seed=4))
        assert forward(other, theirs, 1, 20).shape[1] == 20


# --- what can't be served ---------------------------------------------------------------------------------------


def test_a_cache_of_the_stock_model_is_refused(
    llama: tuple[PreTrainedModel, GPUServer], split: PreTrainedModel
) -> None:
    cache = dynamic(split)
    forward(llama[0], cache, 1, 5)
    with pytest.raises(ModelError, match="computed in this process"):
        forward(split, cache, 1, 1)


def test_a_cache_rebuilt_by_hand_is_refused(split: PreTrainedModel) -> None:
    cache = dynamic(split)
    forward(split, cache, 1, 5)
    for other in (
        DynamicCache([(layer.keys, layer.values) for layer in cache.layers]),
        pickle.loads(pickle.dumps(cache)),
    ):
        with pytest.raises(ModelError, match="5 positions the server does not hold"):
            forward(split, other, 1, 1)


def test_a_cache_of_another_connection_is_refused(
    llama: tuple[PreTrainedModel, GPUServer], split: PreTrainedModel, placement: str
) -> None:
    cache = dynamic(split)
    forward(split, cache, 1, 5)
    with GPUClient(llama[1].endpoint) as client:
        other = from_pretrained(client=client, placement=placement)
        with pytest.raises(ModelError, match="another connection"):
            forward(other, cache, 1, 1)


def test_rows_made_of_parts_of_others_are_refused(split: PreTrainedModel) -> None:
    cache = dynamic(split)
    forward(split, cache, 2, 5)
    for layer in cache.layers:
        layer.keys = torch.cat([layer.keys[:, :, :3].flip(0), layer.keys[:, :, 3:]], dim=2)
    with pytest.raises(ModelError, match="parts of others"):
        forward(split, cache, 2, 1)


def test_a_cache_that_was_dropped_is_an_error_and_a_new_one_is_not(
    llama: tuple[PreTrainedModel, GPUServer], split: PreTrainedModel
) -> None:
    cache = dynamic(split)
    forward(split, cache, 1, 5)
    split.tsqp_client.drop_cache()
    with pytest.raises(RemoteError, match="start with a new cache"):
        forward(split, cache, 1, 1)
    assert_same(forward(split, dynamic(split), 1, 5), forward(llama[0], None, 1, 5))


def test_other_kinds_of_caches_are_refused_by_name(split: PreTrainedModel) -> None:
    cache = dynamic(split)

    class Odd(type(cache.layers[0])):  # type: ignore[misc]
        pass

    cache.layers[0] = Odd()
    with pytest.raises(ModelError, match="is Odd, whose K and V can't be kept on the server"):
        forward(split, cache, 1, 1)


def test_slots_are_given_back_and_run_out_with_an_error(llama: tuple[PreTrainedModel, GPUServer]) -> None:
    with GPUClient(llama[1].endpoint) as client:
        for _ in range(10):
            split = from_pretrained(client=client, placement="layer")
            logits(split)
            split.close()
        models = [from_pretrained(client=client, placement="layer") for _ in range(65)]
        for model in models[:64]:
            logits(model)
        with pytest.raises(ConfigError, match="64 contexts"):
            logits(models[64])
