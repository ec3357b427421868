"""What a runner does inside the profile: python runner.py WHAT ARGUMENTS (JSON). Prints JSON lines.

``tests/test_enclave_runner.py`` starts it and plays the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 30.0
PROMPT_TOKENS, NEW_TOKENS = 200, 12


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# --- models -----------------------------------------------------------------------------------------------------


def generate_everywhere(endpoint: str, placements: list[str]) -> None:
    """Greedy tokens, streamed text and sampled tokens of every placement, and of stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils.logging import disable_progress_bar

    import tsqp
    from tsqp.demo import PROMPT, model_path

    torch.set_num_threads(1)
    disable_progress_bar()  # tqdm would try to make a semaphore in /dev/shm
    tokenizer = AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)

    def outcomes(model: Any) -> dict[str, Any]:
        streamed = io.StringIO()
        with contextlib.redirect_stdout(streamed):
            greedy = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, streamer=TextStreamer(tokenizer)
            )
        torch.manual_seed(7)
        sampled = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True)
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
        found = {name: ids[0].tolist() for name, ids in (("greedy", greedy), ("sampled", sampled), ("beams", beams))}
        return {**found, "streamed": streamed.getvalue()}

    stock = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32, local_files_only=True)
    tell(placement="stock", stats={}, **outcomes(stock))
    for placement in placements:
        where = None if placement == "local" else endpoint
        options = {} if where is None else {"perf_log": f"/tmp/{placement}.csv"}
        model = tsqp.from_pretrained(model_path(), where, placement, dtype="float32", **options)
        found = outcomes(model)
        stats = {} if model.tsqp_client is None else dict(model.tsqp_client.stats)
        model.close()
        rows = len(Path(f"/tmp/{placement}.csv").read_text().splitlines()) if options else 0
        wanted = ("transport", "shm_transfers", "zmq_transfers", "shm_bytes", "zmq_bytes")
        tell(placement=placement, stats={name: stats.get(name) for name in wanted}, rows=rows, **found)


def generate_on(endpoint: str) -> None:
    """Generates again and again, with a line for each; says when the server is dead."""
    import torch

    import tsqp
    from tsqp.demo import model_path
    from tsqp.errors import PeerDiedError

    torch.set_num_threads(1)
    model = tsqp.from_pretrained(model_path(), endpoint, "fused", dtype="float32")
    inputs = {"input_ids": torch.arange(3, 11)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    try:
        while True:
            tell(tokens=model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())
    except PeerDiedError as error:
        tell(died=str(error), at=time.monotonic())


def wait_for_message(endpoint: str) -> None:
    """Waits for a message that never comes; says when the server is dead."""
    import tsqp
    from tsqp.errors import PeerDiedError

    with tsqp.connect(endpoint, PATIENCE_S) as channel:
        tell(waiting=True, transport=channel.transport)
        try:
            channel.recv(PATIENCE_S)
        except PeerDiedError as error:
            tell(died=str(error), at=time.monotonic())


# --- channels ---------------------------------------------------------------------------------------------------


def exchange(endpoint: str, options: list[dict[str, Any]], sizes: list[int]) -> None:
    """Messages to an echo and back, in every way there is to send and to receive; one line for each connection."""
    import torch

    import tsqp

    def check(message: Any, data: torch.Tensor, tag: int) -> None:
        assert message.tag == tag
        assert torch.equal(message.tensors[0], data)

    async def exchange_async(channel: Any, data: torch.Tensor) -> None:
        await channel.asend([data], tag=3, timeout=PATIENCE_S)
        check(await channel.arecv(PATIENCE_S), data, 3)

    for given in options:
        with tsqp.connect(endpoint, PATIENCE_S, **given) as channel:
            for nbytes in sizes:
                data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
                channel.send([data], tag=1, meta={"size": nbytes}, timeout=PATIENCE_S)
                check(channel.recv(PATIENCE_S), data, 1)
                channel.send([data], tag=2, timeout=PATIENCE_S)
                with channel.lease(PATIENCE_S) as message:
                    check(message, data, 2)
                asyncio.run(exchange_async(channel, data))
            tell(
                transport=channel.transport,
                **{name: channel.stats[name] for name in ("shm_transfers", "zmq_transfers")},
            )


def ring(handle: list[Any], back: list[Any], count: int) -> None:
    """Reads a bare ring of the host's and writes what it read to another one."""
    import tsqp

    handles = [(*given[:3], bytes.fromhex(given[3])) for given in (handle, back)]
    with tsqp.ShmRingBuffer(*handles[0]) as there, tsqp.ShmRingBuffer(*handles[1]) as here:
        for _ in range(count):
            with there.acquire_read(PATIENCE_S) as data, here.acquire_write(PATIENCE_S, len(data)) as slot:
                slot[:] = data
    tell(copied=count)


# --- what is refused --------------------------------------------------------------------------------------------


def refusals(handle: list[Any]) -> None:
    """The error of everything that can't work, by name."""
    import tsqp
    from tsqp.demo import model_path

    tcp, ipc = "tcp://127.0.0.1:45999", "ipc:///tmp/a.sock"
    attach = (*handle[:3], bytes.fromhex(handle[3]))
    uses: dict[str, Callable[[], Any]] = {
        "connect ipc": lambda: tsqp.connect(ipc),
        "connect block": lambda: tsqp.connect(tcp, wait="block"),
        "client ipc": lambda: tsqp.GPUClient(ipc),
        "client default": tsqp.GPUClient,
        "client block": lambda: tsqp.GPUClient(tcp, wait="block"),
        "model ipc": lambda: tsqp.from_pretrained(model_path(), ipc),
        "model block": lambda: tsqp.from_pretrained(model_path(), tcp, wait="block"),
        "listen ipc": lambda: tsqp.listen(ipc),
        "listen tcp": lambda: tsqp.listen("tcp://127.0.0.1:0"),
        "listen tcp without shm": lambda: tsqp.listen("tcp://0.0.0.0:0", shm=False),
        "server": lambda: tsqp.GPUServer(model_path(), "tcp://127.0.0.1:0", device="cpu"),
        "ring": lambda: tsqp.ShmRingBuffer(4096, 2),
        "ring with a name": lambda: tsqp.ShmRingBuffer(4096, 2, "tsqp-fixed", create=True),
        "ring block": lambda: tsqp.ShmRingBuffer(*attach, wait="block"),
    }
    for name, use in uses.items():
        tell(name=name, error=_error(use))
    os.environ["TSQP_ENCLAVE"] = "sgx"
    tell(name="TSQP_ENCLAVE", error=_error(lambda: tsqp.connect(tcp)))
    tell(name="TSQP_ENCLAVE ring", error=_error(lambda: tsqp.ShmRingBuffer(*attach)))


def _error(use: Callable[[], Any]) -> str:
    try:
        use()
    except Exception as error:  # noqa: BLE001 - its class is part of the answer
        return f"{type(error).__name__}: {error}"
    return "none"


def commands(lines: list[list[str]]) -> None:
    """Runs commands of tsqp one after the other in this process, which has torch loaded then."""
    from tsqp import cli

    for arguments in lines:
        out, err, code = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(arguments)
            except SystemExit as left:
                code = left.code or 0
        tell(arguments=arguments, code=code, out=out.getvalue(), err=err.getvalue(), torch="torch" in sys.modules)


WHAT: dict[str, Callable[..., None]] = {
    "generate_everywhere": generate_everywhere,
    "generate_on": generate_on,
    "wait_for_message": wait_for_message,
    "exchange": exchange,
    "ring": ring,
    "refusals": refusals,
    "commands": commands,
}

if __name__ == "__main__":
    WHAT[sys.argv[1]](*json.loads(sys.argv[2]))
