"""The model of the inference benchmark: a random one, equal in every process, and its prefill and decode, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20240607
#: ``llama-1b``: LLaMA-3.2-1B's dimensions. ``tiny`` is for trying the benchmark itself.
SIZES: dict[str, dict[str, int]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    },
}


@dataclass(frozen=True)
class Spec:
    """What every process of a run builds and how it computes."""

    size: str
    layers: int
    dtype: str
    device: str
    threads: int
    linear_backend: str = "auto"

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            **SIZES[self.size],
            num_hidden_layers=self.layers,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def build(spec: Spec) -> LlamaForCausalLM:
    """The random model on the spec's device; equal in every process that calls this with an equal spec."""
    config = spec.config()
    with torch.device("meta"):
        skeleton = LlamaForCausalLM._from_config(config, dtype=spec.torch_dtype)
    model = skeleton.to_empty(device=spec.device).eval().requires_grad_(False)
    torch.manual_seed(SEED)
    spread = config.hidden_size**-0.5  # every module keeps its input's magnitude: logits of different tokens differ
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, spread)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(spec.device)
    return model


def random_ids(spec: Spec, tokens: int) -> Tensor:
    """A prompt, int64 [1, tokens], the same for the same arguments."""
    vocabulary = SIZES[spec.size]["vocab_size"]
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))


class Timed:
    """Prefill and decode of one model, stock or split, as ``generate`` does them: with a cache.

    ``device`` is where the model takes its input; a split model's is the CPU.
    """

    def __init__(self, model: Any, device: str) -> None:
        self._model = model
        self._device = torch.device(device)
        self._cache: Any = None

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits of the last position; the cache of the forwards since the last :meth:`forget` is used and kept."""
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1]
        return logits

    def _clocked(self, ids: Tensor) -> float:
        self._finish()
        begin = time.perf_counter()
        self._forward(ids)
        self._finish()
        return time.perf_counter() - begin

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def forget(self) -> None:
        """Drops the cache."""
        self._cache = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> float:
        """Seconds of a prefill of ``ids`` [1, tokens]; its cache is kept for :meth:`decode`."""
        self.forget()
        return self._clocked(ids.to(self._device))

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> list[float]:
        """Seconds of each step that adds one of ``tokens`` [steps] to the cache."""
        return [self._clocked(token.view(1, 1)) for token in tokens.to(self._device)]

    @torch.inference_mode()
    def logits(self, ids: Tensor, steps: int, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Greedy tokens [steps + 1] and the logits [steps + 1, vocabulary], float32, that chose them, of a prefill and
        ``steps`` decode steps. These are fed ``tokens`` [steps or more], by default the model's own.
        """
        self.forget()
        rows = [self._forward(ids.to(self._device))]
        for step in range(steps):
            token = rows[-1].argmax() if tokens is None else tokens[step].to(self._device)
            rows.append(self._forward(token.view(1, 1)))
        self.forget()
        found = torch.stack(rows).float().cpu()
        return found.argmax(-1), found
