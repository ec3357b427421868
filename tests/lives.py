"""Processes of the lifecycle tests: servers to be killed, clients to be forgotten, programs that end in any way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from peers import PATIENCE_S


def model_server(wire: Connection, endpoint: str) -> None:
    """A GPUServer of the tests' tiny model; binds when told to, and then serves until it is killed or told to stop."""
    from rpc_support import server_of, tiny_model

    server = server_of(tiny_model(), endpoint)
    wire.send("loaded")
    wire.recv()
    with server:
        wire.send("serving")
        wire.recv()


def model_client(wire: Connection, endpoint: str, layers: int, shape: tuple[int, ...]) -> None:
    """Makes the server keep K and V for it, and waits to be killed."""
    import torch

    import tsqp

    client = tsqp.GPUClient(endpoint)
    for layer in range(layers):
        query = torch.randn(1, 4, 1, shape[-1])
        client.attention_scores(layer, query, torch.randn(shape), torch.randn(shape))
    wire.send("kept")
    signal.pause()


def silent_server(wire: Connection, endpoint: str) -> None:
    """Takes a client's hello and never answers it."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        wire.send("bound")
        router.recv_multipart()
        wire.send("hello")
        signal.pause()


def spawned_reader(handle: Any, endpoint: str, count: int) -> None:
    """For `multiprocessing` with its spawn method: reads a ring by its handle, and sends what it read to a server."""
    import torch

    import tsqp

    with tsqp.ShmRingBuffer(*handle) as ring, tsqp.connect(endpoint, PATIENCE_S) as channel:
        for number in range(count):
            with ring.acquire_read(PATIENCE_S) as view:
                data = bytearray(view)
            tensor = torch.frombuffer(data, dtype=torch.uint8)
            channel.send([tensor], request_id=number, timeout=PATIENCE_S)


def spawned_server(endpoint: str, count: int) -> None:
    import tsqp

    with tsqp.listen(endpoint) as listener, listener.accept(PATIENCE_S) as channel:
        for _ in range(count):
            with channel.lease(PATIENCE_S) as message:
                channel.send(message.tensors, request_id=message.request_id, timeout=PATIENCE_S)


# --- programs that end --------------------------------------------------------------------------------------------

#: Everything tsqp has that is open at the end, as globals of the main module; both ends live in one process.
OPEN_EVERYTHING = """
listener = tsqp.listen({endpoint!r}, 1 << 16, 4)
client = tsqp.connect(listener.endpoint, 10)
server = listener.accept(10)
client.send([torch.arange(100)], request_id=1)
lease = server.lease(10)
message = lease.__enter__()
kept = message.tensors[0]
server.send([torch.zeros(100_000)], request_id=2, transfer=True)
writer = tsqp.ShmRingBuffer(4096, 4)
reader = tsqp.ShmRingBuffer(*writer.handle())
writing = writer.acquire_write(0)
view = writing.__enter__()


def in_thread(wait):
    # For ever: the end of the program ends the wait.

    def run():
        try:
            while True:
                wait()
        except tsqp.errors.ClosedError:
            pass

    threading.Thread(target=run, daemon=True).start()


"""
NAMES = ["listener", "client", "server", "lease", "message", "kept", "writer", "reader", "writing", "view"]

#: How a program ends: the code, and its exit status.
ENDINGS = {
    "falls off the end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("raise SystemError('on purpose')", 1),
    "os._exit": ("os._exit(4)", 4),
    "threads wait": (
        "for wait in (client.recv, server.recv, listener.accept, listener.wait): in_thread(wait)\ntime.sleep(0.05)",
        0,
    ),
    "a thread ends last": (
        "threading.Thread(target=lambda: [time.sleep(0.1), client.send([]), server.poll()]).start()",
        0,
    ),
    "an exit handler closes": ("atexit.register(listener.close); atexit.register(client.close)", 0),
    "an exit handler uses": ("atexit.register(lambda: client.send([], timeout=1))", 0),
    "objects in a cycle": (
        "loop = [listener, client, server, writer, reader]; loop.append(loop); del listener, client",
        0,
    ),
    "held by a module": (
        "sys.modules['other'] = types.ModuleType('other'); sys.modules['other'].x = (client, lease, view)",
        0,
    ),
    "SIGTERM": ("os.kill(os.getpid(), 15); time.sleep(10)", -15),
    "Ctrl-C": ("signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2); time.sleep(10)", -2),
}

#: Run by a fresh interpreter: forks before anything is opened, so that each program costs no start of its own. A child
#: becomes the main program, and the interpreter ends in it as it ends in any other.
ZYGOTE = """
import atexit, json, os, signal, sys, threading, time, types
import torch, tsqp
from tsqp import listener as _1, transport as _2
statuses, running = {}, {}


def wait_for_one():
    pid, status = os.wait()
    statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)


for number, code in enumerate(json.load(sys.stdin)):
    if len(running) == 3:
        wait_for_one()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os.dup2(os.open(f"{directory}/{number}", os.O_CREAT | os.O_WRONLY), 2)
        break
    running[pid] = number
else:
    while running:
        wait_for_one()
    print(json.dumps([statuses[number] for number in sorted(statuses)]))
    code = ""
exec(code, globals())
"""


def run_programs(programs: list[str], directory: str) -> list[tuple[int, str]]:
    """Exit status and standard error of each."""
    command = [sys.executable, "-c", ZYGOTE.replace("{directory}", directory)]
    done = subprocess.run(command, input=json.dumps(programs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = []
    for number, status in enumerate(json.loads(done.stdout)):
        with open(os.path.join(directory, str(number))) as file:
            results.append((status, file.read()))
    return results


def idler(wire: Connection, role: str, endpoint: str, wait: str) -> None:
    """Exchanges some messages, then waits for as long as it is told and says how much processor time that took."""
    import torch

    import tsqp

    if role == "server":
        listener = tsqp.listen(endpoint, wait=wait)
        wire.send("listening")
        channel = listener.accept(PATIENCE_S)
    else:
        channel = tsqp.connect(endpoint, PATIENCE_S, wait=wait)
    for _ in range(50):
        if role == "client":
            channel.send([torch.zeros(10)], timeout=PATIENCE_S)
        message = channel.recv(PATIENCE_S)
        if role == "server":
            channel.send(message.tensors, timeout=PATIENCE_S)
    wire.send("exchanged")
    seconds = wire.recv()
    before = time.process_time()
    if role == "server":
        assert listener.wait(seconds) == []
    else:
        with contextlib.suppress(TimeoutError):
            channel.recv(seconds)
    wire.send(time.process_time() - before)
    wire.recv()
    channel.close()
    if role == "server":
        listener.close()
