"""Every part of the transport benchmark, at a fraction of its pace: what it keeps is whole and makes sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("rich")

from benchmarks import bars, clients, paired
from benchmarks.peers import registry
from benchmarks.report import Samples, figure, size_text
from benchmarks.transport import PARTS, parse_size

ROOT = Path(__file__).parent.parent
PEERS = ("tsqp", "multipart", "pipe", "copies")
LIMIT_S = 200.0
QUICK = ["--pace", "0.02", "--sizes", "64B", "100KB", "--peers", *PEERS, "--large-sizes", "12MB"]
QUICK += ["--clients", "1", "3", "--slots", "1", "4"]
CELL = {"median_us", "p99_us", "max_us", "count", "rounds", "cpu_us_per_message", "client_cpu_us_per_message"}
CELL |= {"server_cpu_us_per_message", "faults_per_message", "copied_per_byte_delivered"}


def benchmark(*arguments: str, part: str = "transport") -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does, in a process of its own: it pins itself to a core."""
    command = [sys.executable, "-m", f"benchmarks.{part}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """What one run of all parts kept."""
    path = folder / "transport.json"
    run = benchmark(*QUICK, "--json", str(path))
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def parts(result: dict[str, Any]) -> dict[str, Any]:
    return result["parts"]


pytestmark = pytest.mark.watchdog(LIMIT_S + 20)


def test_every_part_ran_and_the_machine_is_named(result: dict[str, Any]) -> None:
    assert list(result["parts"]) == list(PARTS)
    assert result["machine"]["versions"]["torch"]
    assert result["machine"]["cores"] == len(os.sched_getaffinity(0))


def test_echo_measures_every_peer_at_every_size(parts: dict[str, Any]) -> None:
    echo = parts["echo"]
    assert set(echo["cells"]) == set(PEERS)
    for by_size in echo["cells"].values():
        assert list(by_size) == ["64", str(100 << 10)]
        for cell in by_size.values():
            assert set(cell) == CELL
            assert 0 < cell["median_us"] <= cell["p99_us"] <= cell["max_us"]
            assert cell["count"] >= 8
            assert cell["faults_per_message"] >= 0


def test_echo_counts_both_ends_cpu_time(parts: dict[str, Any]) -> None:
    cells = parts["echo"]["cells"]
    for key in ("tsqp", "multipart", "pipe"):
        for cell in cells[key].values():
            ends = cell["client_cpu_us_per_message"], cell["server_cpu_us_per_message"]
            assert min(ends) > 0
            assert cell["cpu_us_per_message"] == pytest.approx(sum(ends))
    assert cells["copies"]["64"]["server_cpu_us_per_message"] == 0


def test_echo_says_how_often_bytes_are_copied(parts: dict[str, Any]) -> None:
    echo = parts["echo"]
    copied = {key: by_size[str(100 << 10)]["copied_per_byte_delivered"] for key, by_size in echo["cells"].items()}
    assert copied == {"tsqp": 1.5, "multipart": 2.0, "pipe": 4.0, "copies": 1.5}
    assert all(how["why"] for by_size in echo["copies"].values() for how in by_size.values())


def test_stream_is_put_beside_memcpy(parts: dict[str, Any]) -> None:
    stream = parts["stream"]
    rates = stream["gb_per_s"]
    assert set(rates) == {"memcpy", "recv", "lease"}
    assert stream["of_memcpy"] == {way: pytest.approx(rates[way] / rates["memcpy"]) for way in ("recv", "lease")}
    assert min(rates.values()) > 0


def test_rpc_measures_both_dtypes_and_a_bare_channel(parts: dict[str, Any]) -> None:
    assert parts["rpc"]["outputs"] == [2048, 512, 512]
    assert set(parts["rpc"]["round_trips"]) == {"rpc-float32", "rpc-bfloat16", "channel-float32"}
    assert all(found["median_us"] > 0 for found in parts["rpc"]["round_trips"].values())


def test_idle_has_shares_and_a_first_message_for_every_length(parts: dict[str, Any]) -> None:
    idle = parts["idle"]["idle"]
    assert set(idle) == {"channel", "rpc", "futex"}
    for ends in idle.values():
        assert len(ends) == 4
        for cell in ends.values():
            assert cell["client_cpu_percent"] >= 0
            assert cell["server_cpu_percent"] >= 0
            assert 0 < cell["first_message"]["median_us"] < cell["first_round_trip"]["max_us"]


def test_clients_are_counted_apart(parts: dict[str, Any]) -> None:
    for cells in parts["clients"]["sizes"].values():
        assert list(cells["echoes_per_s"]) == ["1", "3"]
        peak = max(cells["echoes_per_s"].values())
        for count, rate in cells["echoes_per_s"].items():
            assert cells["of_peak"][count] == (rate / peak if peak else 0.0)
            if rate:  # on a busy machine no echo may be done in so short a turn
                assert cells["max_over_min"][count] >= 1.0
                assert count != "1" or cells["max_over_min"][count] == 1.0


def test_large_compares_carriers(parts: dict[str, Any]) -> None:
    large = parts["large"]
    measured = set(large["cells"])
    assert {"tsqp", "tsqp-tile", "tsqp-slots", "multipart", "copies"} <= measured
    assert "tsqp-auto" in measured or "tsqp, large ones by auto" in large["skipped"]
    copied = {key: large["cells"][key][str(12 << 20)]["copied_per_byte_delivered"] for key in measured - {"tsqp-auto"}}
    assert copied == {"tsqp": 2.0, "tsqp-tile": 2.0, "tsqp-slots": 1.5, "multipart": 2.0, "copies": 1.5}


def test_slots_measures_echo_and_stream(parts: dict[str, Any]) -> None:
    slots = parts["slots"]
    assert slots["counts"] == [1, 4]
    assert all(slots["echo"][count]["median_us"] > 0 for count in ("1", "4"))
    assert all(slots["stream_gb_per_s"][count] > 0 for count in ("1", "4"))


def test_bars_say_what_was_not_measured(result: dict[str, Any]) -> None:
    found = {bar["bar"]: bar for bar in result["bars"]}
    assert found["echo 1 MB, of the copy limit"]["met"] is None
    copy_limit = found["echo 100 KB, of the copy limit"]
    assert copy_limit["met"] is (copy_limit["measured"] <= 1.6)
    stream = found["stream of 1 MB into private memory, of one core's memcpy"]
    assert stream["met"] is (stream["measured"] >= 0.8)


def test_plots_lie_beside_the_json(result: dict[str, Any], folder: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("size", "large", "clients", "slots"):
        assert (folder / f"transport-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_does_not_exist_is_refused() -> None:
    run = benchmark("ecko")
    assert run.returncode == 2
    assert "'ecko' is no part; there are echo, stream" in run.stderr


def test_bars_are_judged_by_what_they_promise() -> None:
    echo = {
        "sizes_bytes": [64, 1024, 1 << 20],
        "titles": {},
        "cells": {
            "tsqp": {"64": {"median_us": 2.0}, "1024": {"median_us": 4.5}, str(1 << 20): {"median_us": 60.0}},
            "iceoryx2": {"64": {"median_us": 8.0}, "1024": {"median_us": 9.0}},
            "copies": {str(1 << 20): {"median_us": 50.0}},
        },
    }
    found = {bar.text: bar for bar in bars.bars({"echo": echo})}
    assert (found["echo 64 B-1 KB, µs"].measured, found["echo 64 B-1 KB, µs"].met) == (4.5, False)
    assert (found["echo 64 B-1 KB, of iceoryx2"].measured, found["echo 64 B-1 KB, of iceoryx2"].met) == (0.5, True)
    assert (found["echo 1 MB, of the copy limit"].measured, found["echo 1 MB, of the copy limit"].met) == (1.2, True)
    assert found["echo 1 MB, of iceoryx2"].met is None


@pytest.mark.parametrize(
    ("of_peak", "expected"), [({"1": 0.5, "2": 1.0, "4": 0.95}, 0.95), ({"1": 1.0, "2": 0.7, "4": 0.9}, 0.7)]
)
def test_only_more_clients_than_at_the_peak_can_fall_off(of_peak: dict[str, float], expected: float) -> None:
    assert clients.after_peak(of_peak) == expected


def test_quantiles_are_nearest_ranks() -> None:
    samples = Samples([3000, 1000, 2000, 100_000])
    assert (samples.median_us, samples.p99_us) == (2.0, 100.0)


@pytest.mark.parametrize(("text", "nbytes"), [("64B", 64), ("100kb", 100 << 10), ("5MB", 5 << 20), ("128", 128)])
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "63B", "-4", "4TB", "1.5MB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="is no size"):
        parse_size(text)


def test_numbers_are_shown_with_three_digits() -> None:
    assert [figure(value) for value in (0.5, 12.34, 1234.5)] == ["0.50", "12.3", "1234"]
    assert [size_text(nbytes) for nbytes in (64, 100 << 10, 15 << 20)] == ["64 B", "100 KB", "15 MB"]


def test_every_peer_has_a_key_a_title_and_counted_copies() -> None:
    for key, peer in registry().items():
        assert peer.key == key
        assert peer.title
        for nbytes in (64, 5 << 20, 64 << 20):
            copies = peer.copies(nbytes)
            assert copies is not None
            assert copies.per_byte_delivered >= 1


def test_a_pair_is_compared_round_by_round(tmp_path: Path) -> None:
    path = tmp_path / "paired.json"
    done = benchmark("tsqp", "multipart", "--size", "1MB", "--rounds", "6", "--json", str(path), part="paired")
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert [len(times) for times in found["times_us"]] == [6, 6]
    ratios = [one / other for one, other in zip(*found["times_us"], strict=True)]
    low, high = found["ratio_95"]
    assert min(ratios) <= low <= found["ratio"] <= high <= max(ratios)
    assert "tsqp / multipart" in done.stdout


def test_the_interval_holds_the_median_and_shrinks_with_more_rounds() -> None:
    random = Random(1)
    ratios = [random.gauss(1.1, 0.1) for _ in range(400)]
    few, many = paired.interval(ratios[:20]), paired.interval(ratios)
    assert few[0] < 1.1 < few[1]
    assert many[0] < 1.1 < many[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert paired.verdict({"peers": ["a", "b"], "ratio_95": many}).startswith("a is slower than b, by ")
    assert paired.verdict({"peers": ["a", "b"], "ratio_95": (0.8, 0.9)}) == "a is faster than b, by 10.0 to 20.0 %"
    assert paired.verdict({"peers": ["a", "b"], "ratio_95": (0.9, 1.1)}).startswith("no difference between a and b")
