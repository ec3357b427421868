"""Checkpoints with files of trusted weights, for the tests of these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import short_directory
from models import make_model
from transformers import PreTrainedModel

from tsqp.server import GPUServer
from tsqp.trusted_making import write_trusted_weights

NORM = "model.norm.weight"
#: Family -> config entries and a placement that can run it. Biases and two embeddings (gpt2, opt), experts (mixtral),
#: a scaled embedding (gemma2), scaled RoPE and a tied head (llama), head norms (qwen3), biases of q, k, v (qwen2).
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "ops"),
    "mistral": ({}, "fused"),
    "qwen2": ({}, "linear"),
    "qwen3": ({}, "layer"),
    "gpt2": ({"n_embd": 48, "n_head": 4, "n_layer": 2}, "fused"),
    "gpt_neox": ({}, "linear"),
    "gemma2": ({"head_dim": 12}, "linear"),
    "mixtral": ({"num_local_experts": 4}, "layer"),
    "opt": ({"word_embed_proj_dim": 48, "ffn_dim": 80}, "none"),  # no placement can
}


@dataclass
class Made:
    """A checkpoint, its file of trusted weights, and the digest of that."""

    stock: PreTrainedModel
    checkpoint: Path
    file: Path
    digest: str

    @property
    def options(self) -> dict[str, Any]:
        return {"trusted_weights": self.file, "trusted_digest": self.digest}


def made(family: str, directory: Path, *, embedding: bool = False, **overrides: Any) -> Made:
    stock = make_model(family, directory / "checkpoint", **{**FAMILIES[family][0], **overrides})
    file = directory / "trusted.safetensors"
    return Made(stock, directory / "checkpoint", file, write_trusted_weights(directory / "checkpoint", file, embedding))


def digest_of(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def without(entries: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != key}


@contextmanager
def serving_checkpoint(path: Path, dtype: str = "auto") -> Iterator[GPUServer]:
    with short_directory() as directory:
        server = GPUServer(path, f"ipc://{directory}/s", "cpu", dtype, 1 << 20, 4)
        with server.start():
            yield server
