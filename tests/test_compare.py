"""Comparing two results: what is matched, what is marked, what is refused; against numbers computed in other ways."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("rich")

from benchmarks import compare
from benchmarks.compare import ResultError, changes, differences, differs, figures, label, load

MACHINE = {"cpu": "a", "cores": 2, "load_average": [1.0], "versions": {"torch": "2.1"}}


def batching(off: float, on: float, **more: Any) -> dict[str, Any]:
    """A result of the batching benchmark with one cell."""
    cell = {"off_per_s": off, "on_per_s": on, "gain": on / off, **more}
    return {"benchmark": "batching", "machine": MACHINE, "options": {"rows": 1}, "clients": {"2": cell}}


def told(before: dict[str, Any], now: dict[str, Any], everything: bool = False) -> str:
    out = io.StringIO()
    compare.show(before, now, Console(file=out, width=200), everything)
    return out.getvalue()


def test_a_figure_is_now_over_before_and_knows_its_better_direction() -> None:
    found = {change.key[-1]: change for change in changes(batching(100.0, 150.0), batching(80.0, 180.0))}
    assert found["off_per_s"].ratio == 0.8
    assert found["off_per_s"].better is False  # fewer requests a second
    assert (found["on_per_s"].ratio, found["on_per_s"].better) == (1.2, True)
    assert found["gain"].ratio == pytest.approx((180 / 80) / (150 / 100))
    assert all(change.beyond_scatter is None for change in found.values())


def test_less_is_better_for_times() -> None:
    def echo(us: float) -> dict[str, Any]:
        cells = {"tsqp": {"1024": {"median_us": us, "p99_us": 2 * us, "count": 9}}}
        return {"benchmark": "transport", "parts": {"echo": {"cells": cells, "seconds": 3.0}}}

    main, detail = changes(echo(4.0), echo(5.0))
    assert (main.key[-1], main.ratio, main.better) == ("median_us", 1.25, False)
    assert (main.now.unit.main, detail.now.unit.main) == (True, False)
    assert label(main.key) == "echo tsqp 1 KB median_us"


def test_entries_of_lists_are_matched_by_what_they_are_not_where() -> None:
    def kernels(*operators: tuple[str, float]) -> dict[str, Any]:
        cells = [{"operator": name, "dtype": "float32", "times_torch": value} for name, value in operators]
        return {"benchmark": "kernels", "runs": [{"threads": 1, "prefill": cells}]}

    found = changes(kernels(("norm", 2.0), ("rotary", 4.0)), kernels(("rotary", 5.0), ("norm", 3.0)))
    assert {change.key[-2]: change.ratio for change in found} == {"rotary float32": 1.25, "norm float32": 1.5}


def test_rounds_of_a_forward_come_from_the_seconds_beside_it() -> None:
    phase = {"stock_ms": 200.0, "split_ms": 300.0, "ratio": 1.5, "stock_s": [0.2, 0.1], "split_s": [0.3, 0.4]}
    result = {"benchmark": "inference", "runs": {"float32": {"splits": {"ops": {"prefill": phase}}}}}
    found = {key[-1]: figure for key, figure in figures(result).items()}
    assert found["stock_ms"].rounds == (200.0, 100.0)
    assert found["ratio"].rounds == (0.3 / 0.2, 0.4 / 0.1)


def test_rounds_that_mirror_a_level_reach_the_figures_below_it() -> None:
    stream = {"gb_per_s": {"recv": 5.0}, "rounds": {"gb_per_s": {"recv": [4.0, 5.0, 6.0]}}}
    (found,) = figures({"benchmark": "transport", "parts": {"stream": stream}}).values()
    assert found.rounds == (4.0, 5.0, 6.0)


def brute_chance(before: list[float], now: list[float]) -> float:
    """The rank test by hand: the share of all ways to deal the values out that lie as far apart, or further."""

    def far(one: tuple[float, ...], other: tuple[float, ...]) -> float:
        above = sum(b > a for a in one for b in other)
        return max(above, len(one) * len(other) - above)

    values, measured = before + now, far(tuple(before), tuple(now))
    hits = total = 0
    for chosen in itertools.combinations(range(len(values)), len(now)):
        other = tuple(values[place] for place in range(len(values)) if place not in chosen)
        hits += far(other, tuple(values[place] for place in chosen)) >= measured
        total += 1
    return hits / total


def test_what_is_marked_is_rarer_than_chance_by_hand() -> None:
    random, marked = Random(2), 0
    for shift in itertools.chain(*[[0.0, 1.0, 2.0, 3.0]] * 15):
        before = [random.gauss(10, 1) for _ in range(random.choice((5, 6)))]
        now = [random.gauss(10 + shift, 1) for _ in range(random.choice((5, 7)))]
        expected = brute_chance(before, now) < compare.CHANCE
        assert differs(before, now) is differs(now, before) is expected
        marked += expected
    assert 10 < marked < 50  # both answers were put to the test


def test_many_rounds_are_judged_alike() -> None:
    random = Random(3)
    before = [random.gauss(10, 1) for _ in range(40)]
    assert differs(before, [random.gauss(11.5, 1) for _ in range(40)]) is True
    assert differs(before, [random.gauss(10, 1) for _ in range(40)]) is False


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_few_rounds_are_not_judged(count: int) -> None:
    assert differs([1.0] * count, [2.0] * count) is None


def test_equal_rounds_do_not_differ() -> None:
    assert differs([1.0] * 5, [1.0] * 5) is False


def test_what_is_marked_is_shown_and_counted() -> None:
    rounds = {"off_per_s": [99.0, 100.0, 101.0, 100.5, 99.5], "on_per_s": [149.0, 150.0, 151.0, 150.5, 149.5]}
    slower = {"off_per_s": [one * 0.5 for one in rounds["off_per_s"]], "on_per_s": rounds["on_per_s"]}
    out = told(batching(100.0, 150.0, rounds=rounds), batching(50.0, 150.0, rounds=slower))
    lines = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in out.splitlines() if "│" in line}
    assert lines == {"clients 2 off_per_s": "*", "clients 2 on_per_s": "", "clients 2 gain": ""}
    assert "3 figures; * more than the scatter of their rounds: 0 better, 1 worse; 1 have too few rounds" in out


def test_machines_and_options_that_differ_are_said_line_by_line() -> None:
    other = batching(1.0, 1.0)
    other["machine"] = {**MACHINE, "cpu": "b", "load_average": [9.0], "versions": {"torch": "2.2", "vllm": "1"}}
    other["options"] = {"rows": 8}
    other["interrupted"] = "Ctrl-C"
    assert differences(batching(1.0, 1.0), other) == [
        "machine cpu: a before, b now",
        "machine versions torch: 2.1 before, 2.2 now",
        "machine versions vllm: none before, 1 now",
        "options rows: 1 before, 8 now",
        "the later run was cut short: Ctrl-C",
    ]
    assert told(batching(1.0, 1.0), other).startswith("machine cpu: a before, b now\n")


def test_figures_of_one_run_only_are_counted_and_named() -> None:
    other = batching(1.0, 1.0)
    other["clients"]["[red]4"] = other["clients"].pop("2")
    out = told(batching(1.0, 1.0), other)
    assert "the results have no figure in common" in out
    assert "only before, 3 figures: clients 2 off_per_s, clients 2 on_per_s, clients 2 gain" in out
    assert "only now, 3 figures: clients [red]4 off_per_s" in out  # a name is text, not mark-up


def test_a_figure_that_was_zero_has_no_ratio() -> None:
    (change, *_) = changes(batching(1.0, 1.0) | {"clients": {"2": {"off_per_s": 0}}}, batching(1.0, 1.0))
    assert change.ratio is None


def test_numbers_that_are_none_are_no_figures() -> None:
    cell = {"off_per_s": float("nan"), "on_per_s": True, "gain": None, "other": 5}
    assert figures({"benchmark": "batching", "clients": {"1": cell}}) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON, or damaged"),
        (b'{"benchmark": "batching", "clients": {"1"', "is not JSON, or damaged"),
        (b"\xff\xfe\x00", "is not JSON, or damaged"),
        (b"[" * 100_000, "is not JSON, or damaged"),
        (b'{"benchmark": "batching", "x": ' + b"[" * 60 + b"]" * 60 + b"}", "is nested deeper than any result"),
        (b"[1, 2]", "does not say which of"),
        (b'{"figures": 1}', "does not say which of"),
        (b'{"benchmark": ["transport"]}', "does not say which of"),
        (b'{"benchmark": "transport"}', "is of the benchmark transport; give a result of batching"),
        (b'{"benchmark": "batching", "clients": {}}', "holds no figures"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(text)
    with pytest.raises(ResultError, match=said) as raised:
        load(path, "batching")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="can't be read"):
        load(tmp_path / "none.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(compare.MOST_BYTES + 1)
    with pytest.raises(ResultError, match="is larger than any result"):
        load(tmp_path / "large.json")


def test_the_command_says_what_is_wrong_and_leaves_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(batching(100.0, 150.0)))
    bad.write_text("{")
    assert compare.main([str(good), str(good)]) == 0
    assert "1.000" in capsys.readouterr().out
    assert compare.main([str(good), str(bad)]) == 1
    assert capsys.readouterr().err == (
        f"python -m benchmarks.compare: {bad} is not JSON, or damaged; give a file that a benchmark has kept\n"
    )
