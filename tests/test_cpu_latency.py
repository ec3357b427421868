"""The limit on how long cores take to wake: what the kernel is asked for, when, and what is said where it can't be."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Outcome, run_here, tsqp_here
from rpc_support import HIDDEN, client_of, server_of, serving, tiny_model, until
from waking import kernel_may_be_asked

import tsqp
from tsqp import cpu_latency, run
from tsqp.errors import ConfigError

pytestmark = pytest.mark.watchdog(120)
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the kernel's place."""
    path = tmp_path / "cpu_dma_latency"
    path.write_bytes(b"")
    monkeypatch.setattr(cpu_latency, "DEVICE", str(path))
    return path


@pytest.fixture
def no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_latency, "DEVICE", str(tmp_path / "nothing"))


def open_files(path: Path) -> int:
    """How often this process has the file open."""
    fds = Path("/proc/self/fd")
    return sum(os.path.realpath(fds / name) == str(path) for name in os.listdir(fds))


def test_the_kernel_is_asked_while_it_is_held(device: Path) -> None:
    latency = tsqp.CpuLatency(7)
    assert not latency.held
    assert open_files(device) == 0
    with latency as entered:
        assert entered is latency
        assert latency.held
        assert struct.unpack("=i", device.read_bytes()) == (7,)
        latency.hold()  # a second time: nothing
        assert open_files(device) == 1
    assert not latency.held
    assert open_files(device) == 0
    latency.release()


def test_a_limit_that_is_dropped_is_not_held(device: Path) -> None:
    latency = tsqp.CpuLatency(0)
    latency.hold()
    del latency
    assert open_files(device) == 0


@pytest.mark.parametrize("us", [-1, 1 << 31, 1.5, True, "0", None])
def test_what_is_no_limit(us: object) -> None:
    with pytest.raises(ConfigError, match="a whole number from 0 to 2147483647"):
        tsqp.CpuLatency(us)  # type: ignore[arg-type]


def test_a_system_without_it(no_device: None) -> None:
    with pytest.raises(ConfigError, match="no such file"), tsqp.CpuLatency(0):
        pytest.fail("it was held")


@pytest.mark.parametrize(
    ("number", "words"), [(13, "run as root, or let a group write it"), (1, "DeviceAllow"), (5, "leave")]
)
def test_a_file_that_may_not_be_written(device: Path, number: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cpu_latency.os, "write", refuse)
    latency = tsqp.CpuLatency(0)
    with pytest.raises(ConfigError, match=words):
        latency.hold()
    assert not latency.held
    assert open_files(device) == 0


def test_a_child_does_not_hold_what_its_parent_holds(device: Path) -> None:
    with tsqp.CpuLatency(0) as latency:
        pid = os.fork()
        if pid == 0:
            os._exit(int(latency.held) + open_files(device))
        assert os.waitpid(pid, 0)[1] == 0
        assert latency.held
        assert open_files(device) == 1


@pytest.mark.skipif(not kernel_may_be_asked(), reason="/dev/cpu_dma_latency may not be written here")
def test_what_this_kernel_says() -> None:
    """In a process of its own: reading the file is asking for a limit, too."""
    code = """
    import os, struct, tsqp
    def now():
        fd = os.open("/dev/cpu_dma_latency", os.O_RDWR)
        try:
            return struct.unpack("=i", os.read(fd, 4))[0]
        finally:
            os.close(fd)
    with tsqp.CpuLatency(0), tsqp.CpuLatency(50):
        assert now() == 0, now()
    names = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert "/dev/cpu_dma_latency" not in names, names
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


# --- the server


def test_a_server_holds_it_while_it_is_asked(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_latency, "CALM_S", 1000.0)
    h, held = torch.randn(1, HIDDEN), []
    with serving(tiny_model(), tmp_path, cpu_latency_us=3) as server, client_of(server) as client:
        client.init()
        compute = server._served.modules[MODULE].call
        server._served.modules[MODULE].call = lambda x: held.append(open_files(device)) or compute(x)
        for _ in range(2):
            client.linear(MODULE, h)
            assert held.pop() == 1
            assert struct.unpack("=i", device.read_bytes()) == (3,)
            assert open_files(device) == 1
            monkeypatch.setattr(cpu_latency, "CALM_S", 0.0)
            until(lambda: open_files(device) == 0)
            monkeypatch.setattr(cpu_latency, "CALM_S", 1000.0)
        client.linear(MODULE, h)
        assert open_files(device) == 1
    assert open_files(device) == 0


def test_a_client_that_takes_no_replies_keeps_no_core_awake(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_latency, "CALM_S", 0.0)
    options = {"max_chunks": 2, "cpu_latency_us": 0}
    with serving(tiny_model(), tmp_path, **options) as server, client_of(server) as client:
        client.init()
        channel = client._channel
        request = client._requests.linear(MODULE, torch.randn(1, HIDDEN))
        while server._pause_s < 1e-3:  # until it has tried in vain for a while
            if channel.can_send():
                channel.send(request.tensors, tag=request.site.method, meta=request.meta, request_id=1)
            else:
                time.sleep(0.01)
        until(lambda: open_files(device) == 0)


def test_it_is_calm_from_the_end_of_the_work(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cpu_latency.time, "monotonic", lambda: now[0])
    awake = cpu_latency.WhileBusy(0)
    awake.tell(busy=False)
    assert open_files(device) == 0
    awake.tell(busy=True)
    now[0] += 50.0  # what it took
    for passed, held in ((0.0, 1), (0.9, 1), (0.2, 0)):
        now[0] += passed
        awake.tell(busy=False)
        assert open_files(device) == held
    awake.tell(busy=True)
    assert open_files(device) == 1
    awake.close()
    assert open_files(device) == 0


def test_a_server_without_it_leaves_it_alone(device: Path, tmp_path: Path) -> None:
    with serving(tiny_model(), tmp_path) as server, client_of(server) as client:
        client.linear(MODULE, torch.randn(1, HIDDEN))
    assert device.read_bytes() == b""


def test_a_server_that_may_not_says_so_before_it_loads(no_device: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a CPU latency of 0 us can't be asked for"):
        tsqp.GPUServer("no-such-model", f"ipc://{tmp_path}/s", cpu_latency_us=0)


def test_clients_do_not_pay_where_it_fails_later(
    device: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_of(tiny_model(), f"ipc://{tmp_path}/s", cpu_latency_us=0)
    device.unlink()
    with server, client_of(server) as client:
        for _ in range(3):
            assert client.linear(MODULE, torch.randn(1, HIDDEN)).shape[0] == 1
    assert caplog.text.count("cores sleep as the system lets them") == 1


# --- the commands


@pytest.mark.parametrize(
    ("here", "arguments"),
    [
        (tsqp_here, ("serve",)),
        (tsqp_here, ("generate", "--prompt", "And", "--placement", "local")),
        (tsqp_here, ("prefill", "--placement", "local")),
        (run_here, ("--prompt", "And", "--placement", "local")),
    ],
)
def test_commands_say_that_it_can_not_be(
    here: Callable[..., Outcome],
    arguments: tuple[str, ...],
    no_device: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLAMA_IPC_PATH", f"{tmp_path}/s")
    outcome = here(capsys, *arguments, "--cpu-latency-us", "0")
    assert outcome.code == 1
    assert outcome.err.count("a CPU latency of 0 us can't be asked for") == 1, outcome
    assert "Traceback" not in outcome.err


def test_a_runner_holds_it_while_it_generates(
    device: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = []
    monkeypatch.setattr(run, "continue_prompt", lambda *_, **__: held.append(open_files(device)))
    outcome = run_here(capsys, "--prompt", "And", "--placement", "local", "--cpu-latency-us", "5")
    assert outcome.code == 0, outcome
    assert held == [1]
    assert struct.unpack("=i", device.read_bytes()) == (5,)
    assert open_files(device) == 0
