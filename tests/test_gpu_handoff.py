"""The benchmark of hand-offs to a CUDA stream, against a driver of our own that does what it is told."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import fake_cuda
import pytest
import torch
from benchmarks import gpu_handoff, gpu_server
from benchmarks.gpu_handoff import Caller
from benchmarks.gpu_server import Lanes, Plan
from benchmarks.peers import WrongAnswerError

from tsqp import connect
from tsqp.cuda_driver import Driver
from tsqp.errors import DeviceError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    return fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def driver(library) -> Iterator[Driver]:
    driver = Driver(library=library)
    yield driver
    fake_cuda.calls(library)
    driver.close()


def callers_of(lanes, nbytes):
    return [Caller(request, reply, nbytes) for lane in lanes.handles() for request, reply in lane]


def closed(lanes, callers):
    lanes.close()
    for caller in callers:
        caller.close()


def test_a_lane_answers_messages_of_the_ring_without_a_thread_of_the_server(driver, library):
    lanes = Lanes(driver, Plan(1, 1, 4096))
    (caller,) = callers = callers_of(lanes, 4096)
    fake_cuda.calls(library)
    lanes.enqueue(2)
    one = ["copy in 4096", "copy out 4096"]
    assert fake_cuda.calls(library) == [
        *("wait64 1 0", *one, "write64 1 0", "write64 2 0"),
        *("wait64 3 0", *one, "write64 3 0", "write64 4 0"),
    ]
    for _ in range(2):
        published = caller.publish()
        assert caller.take() > published
    lanes.enqueue(5)  # and so on, where the rings are
    for _ in range(5):
        caller.publish()
        caller.take()
    closed(lanes, callers)


@pytest.mark.parametrize("narrow", [False, True])
def test_lanes_with_several_pairs_answer_each_in_turn(driver, narrow, monkeypatch):
    if narrow:
        monkeypatch.setenv("FAKE_CUDA_NARROW", "1")
    lanes = Lanes(driver, Plan(2, 3, 256))
    callers = callers_of(lanes, 256)
    lanes.enqueue(4)
    for _ in range(4):
        for caller in callers:
            caller.publish()
        for caller in callers:
            caller.take()
    closed(lanes, callers)


def test_a_changed_reply_is_noticed(driver):
    lanes = Lanes(driver, Plan(1, 1, 4096))
    (caller,) = callers = callers_of(lanes, 4096)
    lane = lanes.lanes[0]
    for place in (0, 2048, 4095):
        lanes.enqueue(1)
        caller.publish()
        while not driver.done(lane._stream):
            pass
        changed = ctypes.c_uint8.from_address(lane.pairs[0].reply.slot + place)
        changed.value ^= 1
        with pytest.raises(WrongAnswerError, match="of 4 KB came back changed"):
            caller.take()
    closed(lanes, callers)


def test_a_client_that_sends_nothing_does_not_keep_a_stream(driver):
    lanes = Lanes(driver, Plan(1, 2, 256))
    lane = lanes.lanes[0]
    lanes.enqueue(20)
    assert not driver.done(lane._stream)
    with pytest.raises(DeviceError, match=r"a stream still waits after 0 s"):
        lane.let_go(patience_s=0)
    lane.let_go()
    assert driver.done(lane._stream)
    lanes.close()


def test_refused_memory_leaves_nothing_behind(driver, monkeypatch):
    monkeypatch.setattr(driver, "register", lambda address, nbytes: 2)
    with pytest.raises(DeviceError, match=r"a ring can't be page-locked: .*CUDA_ERROR_OUT_OF_MEMORY"):
        Lanes(driver, Plan(1, 1, 256))


def test_the_way_by_events_returns_every_message():
    mine, theirs = Pipe()
    driver = fake_cuda.RecordingDriver()
    arguments = (theirs, torch.device("cpu"), driver, driver)
    thread = threading.Thread(target=gpu_server.answer_by_events, args=arguments)
    thread.start()
    what, endpoint = mine.recv()
    assert what == "listening"
    with connect(endpoint, timeout=20.0) as channel:
        assert channel.transport == "shm+tcp"
        for number in range(3):
            sent = torch.arange(number, number + 100)
            channel.send([sent], timeout=20.0)
            assert torch.equal(channel.recv(timeout=20.0).tensors[0], sent)
    thread.join()
    mine.close()
    theirs.close()
    assert [line for line in driver.log if line in ("register", "unregister")] == ["register", "unregister"]
    assert driver.log.count("record stream of cpu") == 3


def test_the_whole_is_measured_between_two_processes(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_handoff, "SIZES", (0, 4096))
    monkeypatch.setattr(gpu_handoff, "RATE_NBYTES", 4096)
    out = tmp_path / "results" / "gpu_handoff.json"
    assert gpu_handoff.main(["--library", library, "--batches", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["device"] | {"events": False} == {
        "name": "a fake",
        "cuda": "12.4",
        "without_words": "",
        "word_bits": 64,
        "events": False,
    }
    counts = {size: cell["count"] for size, cell in result["stream"].items()}
    assert counts == dict.fromkeys(("0", "4096"), gpu_server.AHEAD - gpu_handoff.WARMUP_ROUNDS)
    assert set(result["rate"]) == {"1", "4"}
    assert all(rate > 0 for rate in result["rate"].values())
    shown = capsys.readouterr().out
    assert "Hand-off to a fake and back, CUDA 12.4, words of 64 bits" in shown
    if not torch.cuda.is_available():
        assert "events were not measured: torch sees no CUDA device" in shown


def test_what_was_measured_before_a_fault_is_kept(library, tmp_path, monkeypatch, capsys):
    def refuse(server, lanes, batches):
        raise DeviceError("a stream still waits after 20 s; end this process")

    monkeypatch.setattr(gpu_handoff, "SIZES", (0,))
    monkeypatch.setattr(gpu_handoff, "rate", refuse)
    out = tmp_path / "gpu_handoff.json"
    assert gpu_handoff.main(["--library", library, "--batches", "1", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert set(result["stream"]) == {"0"}
    assert result["faults"] == {"stream": "a stream still waits after 20 s; end this process"}
    assert "stream FAILED: a stream still waits after 20 s" in capsys.readouterr().out


def test_a_driver_without_words_is_said_and_not_measured(tmp_path, capsys):
    library = fake_cuda.build(tmp_path, "-DWITHOUT_WORDS")
    assert gpu_handoff.main(["--library", library, "--batches", "1"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "streams were not measured: the driver (CUDA 12.4) has no cuStreamWaitValue32_v2" in shown


def test_without_a_driver_it_says_so_and_fails(tmp_path, capsys):
    assert gpu_handoff.main(["--library", str(tmp_path / "no.so")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gpu_handoff: there is no CUDA driver here (")
    assert said.endswith("run this where an NVIDIA GPU is\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu is unknown; give cuda:0"),
        (["--batches", "0"], "--batches 0 is no number of 1 or more"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_handoff.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- gpu.sh ----------------------------------------------------------------------------------------------------

STUB_PYTHON = """#!/usr/bin/env bash
case "$*" in
*sysconfig*) echo "$PLACE" ;;
"-m benchmarks.gpu_handoff "*) echo "the table of hand-offs"; exit "$HANDOFF" ;;
"-m benchmarks.inference_summary "*) echo "the table of inference" ;;
*) echo "ran: $*" ;;
esac
"""


@pytest.mark.parametrize("status", [0, 1])
def test_the_gpu_script_ends_with_both_tables_and_tells_what_failed(tmp_path, status):
    for name, text in (("bin/python", STUB_PYTHON), ("path/nvidia-smi", "#!/usr/bin/env bash\necho a stub of $*\n")):
        program = tmp_path / name
        program.parent.mkdir()
        program.write_text(text)
        program.chmod(0o755)
    place = {
        "PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "bin" / "python"),
        "VENV": str(tmp_path),
        "RESULTS": str(tmp_path / "results"),
        "PLACE": str(tmp_path),
        "HANDOFF": str(status),
    }
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--tokens", "64"]
    run = subprocess.run(script, env=place, capture_output=True, text=True, timeout=30, check=False)
    incomplete = ["hand-off benchmark: not measured, or only in part; see above"] if status else []
    summary = [
        "a stub of --query-gpu=name,driver_version,memory.total --format=csv,noheader",
        "CUDA tests: passed",
        "the table of hand-offs",
        *incomplete,
        "the table of inference",
    ]
    assert run.stdout.splitlines()[-len(summary) :] == summary
    assert f"--device cuda:0 --json {tmp_path}/results/gpu.json --tokens 64" in run.stdout
    assert run.returncode == status
