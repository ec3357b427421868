"""Trains the tiny LLaMA that ships in ``src/tsqp/demo``.

    python tools/train_demo.py                    # fetches the text from Debian, trains, writes src/tsqp/demo
    python tools/train_demo.py --text kjv.txt --out /tmp/model

The text is the King James Bible (1611; its copyright has expired) as Debian packages it. The package
``bible-kjv-text`` holds compressed data that only the ``bible`` program of the package ``bible-kjv`` reads.
Without ``--text`` this script downloads both with ``apt-get download``, unpacks them into a temporary
directory (nothing is installed, no root needed) and runs ``bible -f Gen1:1-Rev22:21``. ``--text`` takes the
output of that command, or any text with one sentence or verse per line.

The run is seeded: the same text, versions and kind of processor give the same weights. One core needs about
25 minutes. The loss is cross entropy in nats per token, of held-out chapters where the line says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent
#: SHA-256 of ``bible -f Gen1:1-Rev22:21`` in Debian 12 (packages of version 4.38).
TEXT_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
VERSE = re.compile(r"^(?P<chapter>[0-9]?[A-Za-z]+[0-9]+):[0-9]+ (?P<text>.*)$")
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
WINDOW = 256  # tokens per training example
SAMPLE_PROMPTS = ("In the beginning", "And the king said unto", "The LORD is my")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights besides the text."""

    seed: int = 1611
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    batch: int = 8
    steps: int = 8000
    warmup: int = 200
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    held_out: float = 0.03


def fetch_text(directory: Path) -> Path:
    """Downloads and unpacks Debian's packages into ``directory`` and returns the dumped text."""
    subprocess.run(["apt-get", "download", "bible-kjv", "bible-kjv-text"], cwd=directory, check=True)
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package.name, "unpacked"], cwd=directory, check=True)
    dump = directory / "kjv.txt"
    program = directory / "unpacked/usr/bin/bible"
    command = [str(program), "-p", str(directory / "unpacked/usr/lib"), "-f", "Gen1:1-Rev22:21"]
    with dump.open("wb") as out:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, check=True)
    return dump


def read_chapters(path: Path) -> list[str]:
    """The text as chapters: verses on lines of their own, without their references.

    Lines without a reference (another text than the Bible) make one chapter per blank-line separated block.
    """
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    note = "as expected" if digest == TEXT_SHA256 else "NOT the text of the shipped model"
    print(f"text: {len(raw)} bytes, sha256 {digest} ({note})")
    chapters: list[list[str]] = [[]]
    current = ""
    for line in raw.decode("utf-8").splitlines():
        verse = VERSE.match(line)
        name = verse["chapter"] if verse else current
        if (name != current or not line.strip()) and chapters[-1]:
            chapters.append([])
        current = name
        if line.strip():
            chapters[-1].append(verse["text"] if verse else line.strip())
    return ["\n".join(chapter) + "\n" for chapter in chapters if chapter]


def train_tokenizer(chapters: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded; a prompt starts with ``<s>`` as LLaMA's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4 * WINDOW,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chapters: list[str]) -> torch.Tensor:
    """All chapters as one stream of ids, each as ``<s> ... </s>``; int64 [tokens]."""
    ids: list[int] = []
    for chapter in tokenizer(chapters, verbose=False)["input_ids"]:
        ids += [*chapter, tokenizer.eos_token_id]
    return torch.tensor(ids)


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A LLaMA with grouped-query attention, llama3 RoPE scaling and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=4 * WINDOW,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": WINDOW,
        },
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.97), fused=True)


def train(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe) -> float:
    """Trains on random windows of ``stream``; returns the mean loss of the last 100 steps."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = make_optimizer(model, recipe)
    offsets = torch.arange(WINDOW + 1)
    recent: list[float] = []
    start = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        firsts = torch.randint(len(stream) - WINDOW, (recipe.batch, 1), generator=generator)
        windows = stream[firsts + offsets]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 99:
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{recipe.steps} loss {mean:.4f} {time.monotonic() - start:.0f} s", flush=True)
    return sum(recent) / len(recent)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, batch: int = 16) -> float:
    """Mean loss over consecutive windows of ``stream``, in float32."""
    model.eval()
    count = (len(stream) - 1) // WINDOW
    inputs = stream[: count * WINDOW].view(count, WINDOW)
    targets = stream[1 : count * WINDOW + 1].view(count, WINDOW)
    total = 0.0
    for first in range(0, count, batch):
        logits = model(input_ids=inputs[first : first + batch], use_cache=False).logits
        wanted = targets[first : first + batch].flatten()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum").item()
    return total / (count * WINDOW)


def show_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Prints greedy continuations."""
    for prompt in SAMPLE_PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        print("---", tokenizer.decode(ids[0], skip_special_tokens=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, facts: dict) -> None:
    """Writes the checkpoint (weights as bfloat16), the tokenizer and ``training.json``."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written 0600, which would ship as such
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def run(text: Path, out: Path, recipe: Recipe) -> None:
    """Reads, trains, evaluates the weights as stored, and saves."""
    chapters = read_chapters(text)
    random.Random(recipe.seed).shuffle(chapters)
    held = max(1, int(len(chapters) * recipe.held_out))
    tokenizer = train_tokenizer(chapters[held:], recipe)
    held_stream, stream = encode(tokenizer, chapters[:held]), encode(tokenizer, chapters[held:])
    torch.manual_seed(recipe.seed)
    model = make_model(recipe, tokenizer)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(stream)} tokens to train on, {len(held_stream)} held out; {count} parameters", flush=True)
    loss = train(model, stream, recipe)
    model.to(torch.bfloat16).float()  # what is stored is what is judged
    held_loss = evaluate(model, held_stream)
    print(f"final loss: train {loss:.4f}, held out {held_loss:.4f} nats per token")
    show_samples(model, tokenizer)
    facts = {
        "parameters": count,
        "train_tokens": len(stream),
        "train_loss": round(loss, 4),
        "held_out_loss": round(held_loss, 4),
        "recipe": vars(recipe),
        "torch": torch.__version__,
    }
    save(model, tokenizer, out, facts)


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text to train on, one verse per line (default: from Debian)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "src/tsqp/demo", help="where to write the model")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help=f"default {Recipe.steps}")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help=f"default {Recipe.seed}")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; the shipped model took 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(seed=args.seed, steps=args.steps)
    if args.text:
        run(args.text, args.out, recipe)
        return
    with tempfile.TemporaryDirectory() as directory:
        run(fetch_text(Path(directory)), args.out, recipe)


if __name__ == "__main__":
    main()
