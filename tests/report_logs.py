"""Performance logs for the tests of pictures and traces: of real calls, and made up."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from models import make_model, serving, token_ids

from tsqp import from_pretrained

#: Forwards of :func:`real_log`: a prompt, and then one token each.
PROMPT, DECODES = 12, 5
OLD_TITLES = "ID Method Serialize(ms) Send(ms) Recv(ms) Deserialize(ms) Total(ms) Sent(KB) Recv(KB) Throughput(MB/s)"


def real_log(path: Path, placement: str) -> None:
    """The log of a prefill and decode steps of a small model on a server."""
    with serving(make_model("llama")) as server:
        model = from_pretrained(endpoint=server.endpoint, placement=placement, perf_log=path)
        with torch.no_grad():
            model.generate(token_ids(1, PROMPT), max_new_tokens=DECODES + 1, min_new_tokens=DECODES + 1)
        model.close()


def raw_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl log, read without tsqp."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry for entry in entries if "id" in entry]


def made_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of a call of 1 ms: recv takes 0.7 of it (compute 0.3, queue 0.1, wait 0.3), the others 0.1 each."""
    row: dict[str, Any] = {"id": number, "method": "BatchLinear", "serialize_ms": 0.1, "send_ms": 0.1, "recv_ms": 0.7}
    row |= {"deserialize_ms": 0.1, "total_ms": 1.0, "sent_kb": 4.0, "recv_kb": 4.0, "throughput_mb_s": 7.8}
    row |= {"carrier": "shm", "layer": 0, "placement": "ops", "compute_ms": 0.3, "queue_ms": 0.1, "wait_ms": 0.3}
    return {**row, "forward": 1, "start_ms": 2.0 * number, "status": 0, **changes}


def made_log(path: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as JSON Lines; returns the path as a text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def old_log(path: Path, calls: int = 50) -> str:
    """The ten columns of the system before."""
    rng = random.Random(0)
    lines = ["ZMQ performance log", OLD_TITLES, "-" * len(OLD_TITLES)]
    for number in range(calls):
        method = rng.choice(["BatchLinear", "Matmul", "Embedding", "LMHead"])
        parts = [rng.uniform(0.01, 2) for _ in range(4)]
        kb = 2.0 ** rng.uniform(1, 12)
        cells = [number, method, *(f"{part:.3f}" for part in [*parts, sum(parts)]), f"{kb:.2f}", f"{kb:.2f}", "1.00"]
        lines.append(" ".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
