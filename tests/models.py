"""Tiny random models of the families the tests run, small enough to build in milliseconds.

Weights are drawn with a standard deviation large enough for logits to differ clearly between tokens, so that
equal greedy tokens mean equal computation and not a common collapse.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tsqp.client import GPUClient
from tsqp.server import GPUServer

VOCAB_SIZE = 97
LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Family -> config entries. Between them: scaled RoPE and tied embeddings, sliding window, biases, q/k norms
#: with a head size of their own.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
}


def make_model(
    family: str,
    path: Path | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random model of ``family``, in eval mode, the same for the same arguments.

    ``overrides`` are config entries (``model_type`` too, for families not in :data:`FAMILIES`). With ``path``
    its checkpoint is saved there as well. The caller's random state is left as it was.
    """
    entries = {**_COMMON, **FAMILIES.get(family, {"model_type": family}), **overrides}
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = torch.randn_like(parameter) * 0.15
                parameter.copy_(1.0 + spread if "norm" in name else spread)
    model = model.to(dtype)
    if path is not None:
        model.save_pretrained(path)
    return model


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random ids that are no special token, int64."""
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of random prompts of these lengths, padded on the left."""
    width = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), width, dtype=torch.int64),
        torch.zeros(len(lengths), width, dtype=torch.int64),
    )
    for row, length in enumerate(lengths):
        ids[row, width - length :] = token_ids(length, seed=seed + row)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def serving(model: PreTrainedModel, **options: Any) -> Iterator[GPUServer]:
    """A running server of a copy of ``model`` (the caller's stays a model of its own), with small rings."""
    usual = {"max_chunk_bytes": 1 << 20, "max_chunks": 4, "device": "cpu"}
    with tempfile.TemporaryDirectory(prefix="tsqp-") as directory:
        endpoint = f"ipc://{directory}/server.sock"
        server = GPUServer(copy.deepcopy(model), endpoint, **{**usual, **options})
        with server.start():
            with GPUClient(endpoint) as client:
                client.ping()  # now every thread of the server is up
            yield server


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """The model's logits for ``inputs``, by default for two prompts of twelve tokens."""
    return model(**(inputs or {"input_ids": token_ids(2, 12)})).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Shapes are equal and no value differs by more than ``tolerance`` of the largest expected one."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
