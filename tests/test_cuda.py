"""The CUDA side of the server: its bookkeeping with a driver of our own, and the whole where there is a device."""

from __future__ import annotations

import contextlib

import pytest
import torch
from carriers import CARRIERS, pair_over
from fake_cuda import RecordingDriver
from rpc_support import HIDDEN, client_of, serving, tiny_model, until

from tsqp.cuda import Capture, CudaWork, Graphs, PageLock

PATIENCE_S = 20.0
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def test_page_lock_is_given_back_after_the_last_copy_and_once():
    driver = RecordingDriver()
    lock = PageLock((4096, 8192), driver, driver.synchronize)
    assert lock.pinned
    assert driver.registered == {4096: 8192}
    lock.release()
    lock.release()
    assert not lock.pinned
    assert driver.log == ["register", "synchronize", "unregister"]


def test_a_failed_device_does_not_keep_pages_locked(caplog):
    driver = RecordingDriver()

    def fail():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    lock = PageLock((4096, 8192), driver, fail)
    lock.release()
    assert driver.registered == {}
    assert "the device has failed: CUDA error: an illegal memory access was encountered" in caplog.text


def test_a_refused_page_lock_says_why_and_releases_nothing():
    driver = RecordingDriver(error=2)
    lock = PageLock((4096, 8192), driver, driver.synchronize)
    assert not lock.pinned
    assert "8192 bytes: CUDA_ERROR_2" in lock.reason
    lock.release()
    assert driver.log == []


def test_without_shared_memory_nothing_is_locked():
    lock = PageLock(None, RecordingDriver(), lambda: None)
    assert not lock.pinned
    assert lock.reason == "no shared memory"


@contextlib.contextmanager
def worked_on(server, driver):
    """A server on the CPU whose replies take the device's way: copied into their slot behind an event."""
    work = CudaWork(torch.device("cpu"), driver, driver)
    server._answering._cuda = work
    yield work


@pytest.mark.parametrize("shm", [True, False])
def test_replies_are_copied_into_their_slot(tmp_path, shm):
    model, driver = tiny_model(), RecordingDriver()
    h = torch.randn(3, HIDDEN)
    with serving(model, tmp_path) as server, worked_on(server, driver), client_of(server, shm=shm) as client:
        attention = model.model.layers[0].self_attn
        for _ in range(8):  # more than there are slots
            q, k = client.batch_linear(0, ["q_proj", "k_proj"], h)
            torch.testing.assert_close(q, attention.q_proj(h).detach())
            torch.testing.assert_close(k, attention.k_proj(h).detach())
        large = torch.randn(400, HIDDEN)  # its result is larger than a slot
        torch.testing.assert_close(client.lm_head(large), model.lm_head(large).detach(), rtol=1e-4, atol=1e-4)
        assert server.stats["page_locked_clients"] == int(shm)
        assert client.stats["operators"]["gpu_linear"]["server_seconds"] > 0
        assert len(driver.registered) == int(shm)
    assert driver.registered == {}
    assert driver.log.count("synchronize") >= 9
    # Never the stream of whichever device is the thread's current one.
    assert {line for line in driver.log if "record" in line} == {"record stream of cpu"}


def test_a_dead_clients_memory_is_unlocked(tmp_path):
    driver = RecordingDriver()
    with serving(tiny_model(), tmp_path) as server, worked_on(server, driver):
        client = client_of(server)
        client.init()
        assert len(driver.registered) == 1
        client.close()
        until(lambda: not driver.registered)
        assert server.stats["page_locked_clients"] == 0


def test_a_refused_page_lock_does_not_keep_a_client_out(tmp_path, caplog):
    with (
        serving(tiny_model(), tmp_path) as server,
        worked_on(server, RecordingDriver(error=712)),
        client_of(server) as client,
    ):
        client.ping()
        assert server.stats["page_locked_clients"] == 0
    assert "is not page-locked (cuMemHostRegister of" in caplog.text


def recorded(function, example):
    """A graph of ``function`` for inputs like ``example``, as far as its user can tell."""

    def replay(x):
        assert x.shape == example.shape
        return function(x)

    return replay


def test_graphs_are_made_of_small_calls_that_come_often():
    made = []

    def capture(function, x):
        made.append(x.shape)
        return recorded(function, x)

    graphs = Graphs(capture)
    x = torch.ones(1, 4)
    for count in range(10):
        assert torch.equal(graphs.run("a", lambda x: x + 1, x, rows=1), x + 1)
        assert len(made) == (count >= 3)
    for _ in range(10):
        graphs.run("large", lambda x: x, torch.ones(100, 4), rows=100)
    assert made == [x.shape]


def test_shapes_without_number_do_not_fill_the_graphs():
    graphs = Graphs(recorded)
    for number in range(20_000):
        graphs.run(number, lambda x: x, torch.ones(1), rows=1)
    assert len(graphs._calls) <= 4 * 1024
    for number in range(2000):
        for _ in range(4):
            graphs.run(-number, lambda x: x, torch.ones(1), rows=1)
    assert len(graphs._graphs) <= 1024


def test_what_can_not_be_captured_is_computed_without_a_graph(caplog):
    tried = []

    def refuse(function, x):
        tried.append(x.shape)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    graphs = Graphs(refuse)
    x = torch.ones(1, 4)
    for _ in range(12):
        assert torch.equal(graphs.run("a", lambda x: x + 1, x, rows=1), x + 1)
    assert tried == [x.shape]  # once and never again
    assert "computing without a CUDA graph: CUDA error: operation not permitted" in caplog.text


class Noted:
    """Stands for torch.cuda where graphs are captured; notes what is done, and in which stream."""

    def __init__(self):
        self.log, self.streams = [], ["main"]

    @contextlib.contextmanager
    def device(self, device):
        self.log.append(f"on {device}")
        yield

    def graph_pool_handle(self):
        self.log.append("pool")
        return "pool"

    def Stream(self):  # noqa: N802
        return NotedStream(self, "side")

    def current_stream(self):
        return NotedStream(self, "main")

    @contextlib.contextmanager
    def stream(self, stream):
        self.streams.append(stream.name)
        yield
        self.streams.pop()

    def CUDAGraph(self):  # noqa: N802
        return NotedGraph(self)

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.log.append(f"begin {pool} {stream.name} {capture_error_mode}")
        with self.stream(stream):
            yield
        self.log.append("end")


class NotedStream:
    def __init__(self, noted, name):
        self.noted, self.name = noted, name

    def wait_stream(self, other):
        self.noted.log.append(f"{self.name} waits for {other.name}")


class NotedGraph:
    def __init__(self, noted):
        self.noted = noted

    def replay(self):
        self.noted.log.append("replay")


def test_graphs_are_captured_on_one_side_stream_and_share_a_pool():
    noted = Noted()
    capture = Capture(noted)

    def double(x):
        noted.log.append(f"computes in {noted.streams[-1]}")
        return x * 2

    replay = capture(double, torch.ones(2))
    captured = ["side waits for main", *["computes in side"] * 3, "main waits for side", "begin pool side thread_local"]
    assert noted.log == ["on cpu", "pool", *captured, "computes in side", "end"]
    noted.log.clear()
    assert torch.equal(replay(torch.full((2,), 3.0)), torch.full((2,), 2.0))  # where it was captured to
    assert noted.log == ["replay"]
    capture(double, torch.ones(2))
    assert noted.log == ["replay", "on cpu", *captured, "computes in side", "end"]


def test_a_captured_input_is_the_graphs_own():
    seen = []

    def remember(x):
        seen.append(x)
        return x

    given = torch.ones(2)
    replay = Capture(Noted())(remember, given)
    replay(torch.full((2,), 7.0))
    assert torch.equal(seen[-1], torch.full((2,), 7.0))  # what a replay computes from
    assert torch.equal(given, torch.ones(2))


def test_the_segments_address_is_where_its_slots_are(endpoint):
    with pair_over(CARRIERS["ring"], endpoint) as both:
        for channel in (both.server, both.client):
            address, nbytes = channel.mapping
            with channel.reserve([((4,), torch.float32)]) as out:
                assert address < out[0].data_ptr() < address + nbytes


@needs_cuda
def test_a_model_on_the_device_equals_the_model_on_the_cpu(tmp_path):
    model = tiny_model()
    h = torch.randn(1, HIDDEN)
    expected = model.lm_head(h).detach()
    with serving(model, tmp_path, device="cuda:0") as server, client_of(server) as client:
        for _ in range(20):  # by itself first, then as a graph
            torch.testing.assert_close(client.lm_head(h), expected, rtol=1e-4, atol=1e-4)
        assert server.stats["page_locked_clients"] == 1


@needs_cuda
def test_graphs_that_share_memory_compute_what_each_is_for():
    graphs = Graphs()
    weights = [torch.randn(8, 8, device="cuda") for _ in range(5)]
    with torch.inference_mode():
        for turn in range(12):
            for number, weight in enumerate(weights):
                for rows in (1, 3):
                    x = torch.full((rows, 8), float(turn + number), device="cuda")
                    found = graphs.run((number, rows), lambda x, w=weight: (x @ w).relu() @ w, x, rows).cpu()
                    expected = ((x @ weight).relu() @ weight).cpu()
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    assert len(graphs._graphs) == 10


def noting(module, called):
    """The module's call, its name noted before."""
    call = module.call

    def noted(x):
        called.append(module.name)
        return call(x)

    return noted


def test_warming_up_computes_with_every_shape(tmp_path):
    model, called = tiny_model(), []
    with serving(model, tmp_path) as server:
        for module in server._served.modules.values():
            module.call = noting(module, called)
        server._operators.warm_up()
    weights = {name: tuple(model.get_submodule(name).weight.shape) for name in server._served.modules}
    assert {weights[name] for name in called} == set(weights.values())
    assert len(called) <= len(set(weights.values())) + 1  # an embedding and an LM head may be of one shape
