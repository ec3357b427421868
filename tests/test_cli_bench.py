"""``tsqp bench``, typed as a user does, outside a checkout: what is printed and kept, against numbers computed here."""

from __future__ import annotations

import argparse
import json
import os
import pty
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from benchmarks import command
from commands import LIMIT_S, Outcome, environment, finish, short_directory, tsqp_here, wait_for
from rich.console import Console

from tsqp import cli_bench
from tsqp.placement import PLACEMENTS

pytestmark = pytest.mark.watchdog(2 * LIMIT_S + 20)

ECHO = ["transport", "--quick", "--part", "echo", "--pace", "0.5", "--seconds-per-cell", "0.1"]
ECHO += ["--sizes", "64B", "100KB", "--peers", "tsqp", "copies"]
KERNELS = ["kernels", "--threads", "1", "--rounds", "5"]


def bench(folder: Path, *arguments: str, **env: str) -> Outcome:
    """Runs ``tsqp bench`` in ``folder`` to its end."""
    return finish(started(folder, *arguments, **env))


def started(folder: Path, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
    """Starts it in a session of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "tsqp", "bench", *arguments],
        cwd=folder,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def of_session(session: int) -> list[str]:
    """Command lines of the live processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return found


def read(path: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept


def rows(text: str) -> dict[str, list[str]]:
    """The cells of all table lines, by the first one."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {first: rest for first, *rest in cells}


@pytest.fixture(scope="module")
def echoes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, Outcome]:
    """Two runs of the same, the later one compared with the earlier."""
    folder = tmp_path_factory.mktemp("bench")
    before = bench(folder, *ECHO, "--json", "old.json")
    now = bench(folder, *ECHO, "--json", "sub/new.json", "--against", "old.json")
    return folder, before, now


def test_transport_keeps_figures_pictures_and_says_how_far_it_is(echoes: tuple[Path, Outcome, Outcome]) -> None:
    folder, before, _ = echoes
    assert before.code == 0, before.err
    assert before.err.startswith("1 of 20: 64 B  tsqp\n")  # 2 sizes, 2 peers, 5 rounds
    kept = read(folder / "old.json")
    assert list(kept["parts"]) == kept["options"]["parts"] == ["echo"]
    shown = rows(before.out.split("median µs")[1].split("percentile")[0])
    for key, title in kept["parts"]["echo"]["titles"].items():
        for cell in kept["parts"]["echo"]["cells"][key].values():
            turns = cell["rounds"]["median_us"]
            assert len(turns) == 5
            assert min(turns) <= cell["median_us"] <= max(turns)
            # Half of all echoes took the median or longer, in five turns that each end with the echo they are in.
            assert cell["count"] / 2 * cell["median_us"] <= 0.5 * 0.1 * 1e6 + 5 * cell["max_us"]
        assert len(shown[title]) == 2
    if (folder / "old-size.png").exists():
        assert (folder / "old-size.png").read_bytes().startswith(b"\x89PNG")
        assert "saved: old.json, old-size.png" in before.out
    else:
        assert "matplotlib is not installed (pip install 'tsqp[bench]')" in before.out


def test_an_earlier_result_is_compared_figure_by_figure(echoes: tuple[Path, Outcome, Outcome]) -> None:
    folder, _, now = echoes
    assert now.code == 0, now.err
    old, new = (read(folder / name)["parts"]["echo"]["cells"] for name in ("old.json", "sub/new.json"))
    table = rows(now.out.split("transport, compared")[1])
    for key in ("tsqp", "copies"):
        for nbytes, size in ((64, "64 B"), (100 << 10, "100 KB")):
            before_us, now_us = (cells[key][str(nbytes)]["median_us"] for cells in (old, new))
            unit, before_text, now_text, ratio, _ = table[f"echo {key} {size} median_us"]
            assert (unit, ratio) == ("µs", f"{now_us / before_us:.3f}")
            assert float(before_text) == pytest.approx(before_us, rel=0.01)
            assert float(now_text) == pytest.approx(now_us, rel=0.01)
    assert "only before" not in now.out
    assert "options parts" not in now.out


def test_compare_alone_shows_the_same_table(
    echoes: tuple[Path, Outcome, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, now = echoes
    again = tsqp_here(capsys, "bench", "compare", str(folder / "old.json"), str(folder / "sub/new.json"))
    assert again.code == 0
    assert rows(again.out) == rows(now.out.split("transport, compared")[1])


def test_a_terminal_shows_a_bar_instead_of_lines(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tsqp", "bench", *ECHO, "--peers", "copies"],
        cwd=tmp_path,
        env=environment(TERM="xterm"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                seen.append(os.read(master, 1 << 16))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=drain)
    reader.start()
    code = process.wait(LIMIT_S)
    reader.join()
    os.close(master)
    shown = b"".join(seen).decode()
    assert code == 0, shown
    assert "0/10" in shown  # 2 sizes, one peer, 5 rounds
    assert "9/10" in shown
    assert "1 of 10" not in shown


def test_inference_passes_its_options_on_and_counts_round_trips(tmp_path: Path) -> None:
    small = ["--model", "tiny", "--layers", "3", "--tokens", "24", "--decode", "2", "--rounds", "3"]
    done = bench(tmp_path, "inference", "--quick", *small, "--placement", "layer", "--placement", "fused")
    assert done.code == 0, done.err
    kept = read(tmp_path / "results" / "inference.json")
    assert list(kept["runs"]) == ["float32"]
    splits = kept["runs"]["float32"]["splits"]
    assert list(splits) == ["layer", "fused"]
    for key, split in splits.items():
        for phase in ("prefill", "decode"):
            cell = split[phase]
            assert cell["round_trips"] == PLACEMENTS[key].round_trips(3) == {"layer": 5, "fused": 8}[key]
            ratios = [ours / stock for ours, stock in zip(cell["split_s"], cell["stock_s"], strict=True)]
            assert cell["ratio"] == pytest.approx(statistics.median(ratios))


def test_batching_counts_whole_requests(tmp_path: Path) -> None:
    done = bench(tmp_path, "batching", "--clients", "2", "--seconds", "0.25", "--rounds", "2", "--json", "b.json")
    assert done.code == 0, done.err
    cell = read(tmp_path / "b.json")["clients"]["2"]
    for name in ("off_per_s", "on_per_s"):
        rates = cell["rounds"][name]
        assert len(rates) == 2
        assert all((rate * 0.25).is_integer() for rate in rates)
        assert cell[name] == pytest.approx(sum(rates) / 2)
    assert f"{cell['on_per_s']:.2f}"[:2] in done.out


def test_ctrl_c_keeps_the_parts_that_ended_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with short_directory() as scratch:
        process = started(
            tmp_path, "transport", "echo", "stream", "--seconds-per-cell", "0.05", "--sizes", "64B", "--peers", "tsqp",
            "pipe", TMPDIR=str(scratch),
        )  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if b"memcpy" in line:  # the second part has begun
                break
        os.killpg(process.pid, signal.SIGINT)
        done = finish(process)
        assert done.code == 130, done.err
        assert "Traceback" not in done.err
        assert "cut short; what was measured until then is kept in results/transport.json" in done.err
        assert list(scratch.iterdir()) == []
    kept = read(tmp_path / "results" / "transport.json")
    assert (kept["interrupted"], list(kept["parts"])) == ("Ctrl-C", ["echo"])
    assert set(kept["parts"]["echo"]["cells"]) == {"tsqp", "pipe"}
    wait_for(lambda: not of_session(process.pid), "the end of every process")


def test_sigterm_keeps_the_operators_that_were_measured(tmp_path: Path) -> None:
    process = started(tmp_path, *KERNELS, "--seconds", "0.4")
    assert process.stderr is not None
    for line in process.stderr:
        if b" of 22: " in line and not line.startswith(b"1 of"):
            break
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.code == 128 + signal.SIGTERM
    kept = read(tmp_path / "results" / "kernels.json")
    assert kept["interrupted"] == "SIGTERM"
    assert 1 <= len(kept["runs"][0]["prefill"]) < 12


def test_a_failure_keeps_what_was_measured_before_it_and_nothing_where_there_was_none(tmp_path: Path) -> None:
    options = argparse.Namespace(json=tmp_path / "b.json", before=None)
    result: dict[str, Any] = {"benchmark": "batching", "clients": {}}

    def fail() -> None:
        raise RuntimeError("a server died")

    def measure_one_and_fail() -> None:
        result["clients"]["1"] = {"off_per_s": 5.0}
        fail()

    for measure, kept in ((fail, False), (measure_one_and_fail, True)):
        with pytest.raises(RuntimeError, match="a server died"):
            command.run(result, options, Console(), measure, lambda found, path: [])
        assert options.json.exists() is kept
    assert read(options.json) == {**result, "interrupted": "a server died"}
    assert list(tmp_path.iterdir()) == [options.json]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["transport", "--part", "ecko"], 2, "tsqp bench transport: 'ecko' is no part; there are echo, stream"),
        (["kernels", "--thread", "1"], 2, "tsqp bench kernels: unrecognized arguments: --thread 1"),
        (["batching", "--clients", "0"], 2, "tsqp bench batching: --clients, --rows, --threads and --rounds are 1 or"),
        (["kernels", "--against", "none.json"], 2, "tsqp bench kernels: --against: none.json can't be read"),
        (["kernels", "--json", "/proc/none/a.json"], 2, "tsqp bench kernels: --json /proc/none/a.json"),
        (["compare", "none.json", "none.json"], 1, "tsqp bench compare: none.json can't be read"),
        (["speed"], 2, "tsqp: No such command 'speed'"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = tsqp_here(capsys, "bench", *arguments)
    assert done.code == code
    assert done.err.startswith(said)
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("name", cli_bench.BENCHMARKS)
def test_each_benchmark_explains_its_own_options(capsys: pytest.CaptureFixture[str], name: str) -> None:
    done = tsqp_here(capsys, "bench", name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: tsqp bench {name} ")
    assert "python -m benchmarks" not in done.out


def test_an_installation_without_benchmarks_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "find_spec", lambda name: None)
    done = tsqp_here(capsys, "bench", "transport", "--quick")
    assert done.code == 1
    assert done.err.startswith("tsqp: this installation of tsqp has no benchmarks")
