"""The figures as Prometheus text, read back by Prometheus' own parser and compared with what clients counted."""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rpc_support import HIDDEN, PATIENCE_S, client_of, serving, tiny_model, until

from tsqp.errors import ConfigError, EndpointBusyError
from tsqp.metrics import MetricsServer
from tsqp.server import GPUServer

parser = pytest.importorskip("prometheus_client.parser")
H = torch.zeros(2, HIDDEN)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GPUServer]:
    with serving(tiny_model(), tmp_path, metrics_port=0) as running:
        yield running


def fetch(port: int | None, path: str = "/metrics") -> Any:
    return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S)


def scraped(server: GPUServer) -> Samples:
    """Name and labels -> value of every sample."""
    with fetch(server.metrics_port) as page:
        families = parser.text_string_to_metric_families(page.read().decode())
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def carrier(name: str, which: str, **more: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted({"carrier": which, **more}.items()))


def test_figures_are_those_the_clients_counted(server: GPUServer) -> None:
    with client_of(server) as one, client_of(server) as two:
        for _ in range(4):
            one.batch_linear(0, ["q_proj"], H)
        two.embedding(torch.zeros(3, dtype=torch.int64))
        trips = [one.round_trips, two.round_trips]
        until(lambda: scraped(server)[("tsqp_round_trips_total", ())] == sum(trips))
        found = scraped(server)
        assert found[("tsqp_clients", ())] == 2
        assert found[("tsqp_calls_total", (("method", "BatchLinear"),))] == 4
        assert found[carrier("tsqp_bytes_total", "shm")] == one.stats["shm_bytes"] + two.stats["shm_bytes"]
        assert found[carrier("tsqp_transfers_total", "shm")] == 2 * sum(trips)
        assert found[carrier("tsqp_transfers_total", "zmq")] == 0
        for number, client in enumerate((one, two)):
            label = str(number)
            assert found[("tsqp_client_round_trips_total", (("client", label),))] == client.round_trips
            assert found[carrier("tsqp_client_bytes_total", "shm", client=label)] == client.stats["shm_bytes"]
            assert found[("tsqp_client_waiting_requests", (("client", label),))] == 0
        seconds = found[("tsqp_operator_seconds_total", (("operator", "gpu_linear"),))]
        assert 0 < seconds < found[("tsqp_compute_seconds_total", ())] < found[("tsqp_busy_seconds_total", ())]
    until(lambda: scraped(server)[("tsqp_clients", ())] == 0)
    after = scraped(server)
    assert not [key for key in after if key[0].startswith("tsqp_client_")]
    assert all(after[key] >= found[key] for key in after if key[0].endswith("_total"))


def test_every_figure_is_described(server: GPUServer) -> None:
    with fetch(server.metrics_port) as page:
        assert page.headers["Content-Type"].startswith("text/plain; version=")
        families = list(parser.text_string_to_metric_families(page.read().decode()))
    assert all(family.documentation.endswith(".") and family.name.startswith("tsqp_") for family in families)
    assert {family.type for family in families} == {"counter", "gauge"}


def test_only_the_loopback_interface_and_only_get(server: GPUServer) -> None:
    others = [address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for address in {address for address in others if not address.startswith("127.")}:
        with socket.socket() as probe:
            probe.settimeout(2.0)
            assert probe.connect_ex((address, server.metrics_port)) != 0
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetch(server.metrics_port, "/secrets")
    request = urllib.request.Request(f"http://127.0.0.1:{server.metrics_port}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    head = urllib.request.Request(f"http://127.0.0.1:{server.metrics_port}/metrics", method="HEAD")
    with urllib.request.urlopen(head, timeout=PATIENCE_S) as page:
        assert int(page.headers["Content-Length"]) > 0
        assert page.read() == b""


@pytest.mark.parametrize("said", [b"", b"GET ", b"\r\n\r\n", b"\xff" * 100_000, b"GET /metrics HTTP/1.1\r\n"])
def test_nonsense_ends_one_connection(server: GPUServer, said: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.metrics_port), timeout=PATIENCE_S) as rude:
        try:
            rude.sendall(said)
            rude.shutdown(socket.SHUT_WR)
            while rude.recv(1 << 16):
                pass
        except OSError:
            pass  # it hung up on us
    assert scraped(server)[("tsqp_clients", ())] == 0


def test_a_port_in_use_and_a_missing_package_are_told(
    tmp_path: Path, server: GPUServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EndpointBusyError, match=f"127.0.0.1:{server.metrics_port}: Address already in use"):
        MetricsServer(server.metrics_port or 0, dict)
    with pytest.raises(ConfigError, match="metrics_port=70000 is no port"):
        GPUServer(tiny_model(), f"ipc://{tmp_path}/other", metrics_port=70000)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"pip install 'tsqp\[metrics\]'"):
        GPUServer(tiny_model(), f"ipc://{tmp_path}/other", metrics_port=0)
