"""The inference benchmark at a tiny size: what it keeps is whole, the answers are stock's, the baselines are what they
are said to be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, token_ids

pytest.importorskip("rich")

from benchmarks import baselines, inference_growth, inference_report, inference_summary
from benchmarks.baselines.client import BaselineClient, BaselineError
from benchmarks.inference import DTYPES, SERVED, parse_arguments
from benchmarks.inference_limits import Peaks, work
from benchmarks.inference_model import Spec, Timed, build

from tsqp.placement import PLACEMENTS

ROOT = Path(__file__).parent.parent
LIMIT_S = 240.0
LAYERS, TOKENS, STEPS = 2, 40, 3
QUICK = ["--model", "tiny", "--layers", str(LAYERS), "--tokens", str(TOKENS), "--decode", str(STEPS), "--rounds", "2"]
QUICK += ["--growth", "--growth-tokens", "16", "32", "--growth-layers", "1"]
PARTS = {"server_ms", "wire_ms", "runner_ms"}

pytestmark = [
    pytest.mark.watchdog(LIMIT_S + 20),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # as the baselines want it themselves
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "inference.json"


@pytest.fixture(scope="module")
def result(path: Path) -> dict[str, Any]:
    """What one run kept, made as a user makes it."""
    options = ["--json", str(path), "--trace", str(path.with_name("trace.json"))]
    command = [sys.executable, "-m", "benchmarks.inference", *QUICK, *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text())


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def splits(result: dict[str, Any], dtype: str) -> dict[str, Any]:
    return result["runs"][dtype]["splits"]


def test_every_placement_and_baseline_is_measured(result: dict[str, Any], splits: dict[str, Any]) -> None:
    assert list(splits) == [*SERVED, *baselines.TITLES]
    assert all(result["runs"][dtype]["stock_attention"] == "sdpa" for dtype in DTYPES)
    for split in splits.values():
        for phase in ("prefill", "decode"):
            assert len(split[phase]["stock_s"]) == len(split[phase]["split_s"]) == 2
            assert min(split[phase][name] for name in ("stock_ms", "split_ms", "ratio", "server_ms")) > 0
            assert split[phase]["overhead_us_per_trip"] >= split[phase]["call_overhead_us_per_trip"] * 0.5


def test_answers_are_stocks(splits: dict[str, Any], dtype: str) -> None:
    for split in splits.values():
        assert split["tokens"] == STEPS + 1
        assert split["logit_difference"] <= (1e-4 if dtype == "float32" else 0.05)
        assert split["tokens_equal"] == split["tokens"] or dtype != "float32"


def test_round_trips_are_the_placements_own(splits: dict[str, Any]) -> None:
    for key, split in splits.items():
        expected = PLACEMENTS["ops" if split["baseline"] else key].round_trips(LAYERS)
        assert [split[phase]["round_trips"] for phase in ("prefill", "decode")] == [expected, expected]


def test_bytes_are_counted_by_carrier(splits: dict[str, Any], dtype: str) -> None:
    assert all(splits[key]["prefill"]["ring_share"] == 1.0 for key in SERVED)
    assert splits["msgpack"]["prefill"]["shm_bytes"] == 0
    flags = splits["flags"]["prefill"]
    assert 0.9 < flags["ring_share"] < 1.0  # its control messages are ZeroMQ's
    cached = 2 * LAYERS * 2 * 16 * TOKENS * getattr(torch, dtype).itemsize  # K and V of two heads of 16
    assert splits["flags"]["decode"]["shm_bytes"] > cached
    assert splits["ops"]["decode"]["shm_bytes"] < splits["flags"]["decode"]["shm_bytes"]


def test_memory_peaks_are_of_each_process(splits: dict[str, Any]) -> None:
    for split in splits.values():
        assert set(split["peak_bytes"]) == {"runner", "server", "stock"}
        assert min(split["peak_bytes"].values()) > 50 << 20  # a Python with torch in it


def test_floors_come_from_peaks_of_the_run(result: dict[str, Any], dtype: str) -> None:
    run = result["runs"][dtype]
    peaks = Peaks(**run["peaks"])
    spec = Spec("tiny", LAYERS, dtype, "cpu", 2)
    assert run["floor_ms"]["prefill"] == pytest.approx(1e3 * work(spec, TOKENS, 0).floor_s(peaks))
    assert run["floor_ms"]["decode"] == pytest.approx(1e3 * work(spec, 1, TOKENS).floor_s(peaks))


def test_bars_judge_what_was_measured(result: dict[str, Any]) -> None:
    found = {bar["bar"]: bar for bar in result["bars"]}
    bar = found[f"float32, prefill {TOKENS}, linear: split / in-process"]
    assert bar["measured"] == result["runs"]["float32"]["splits"]["linear"]["prefill"]["ratio"]
    assert (bar["limit"], bar["met"]) == (1.02, bar["measured"] <= 1.02)
    assert found[f"bfloat16, prefill {TOKENS}, ops: share of bytes through the ring"]["met"] is True
    assert "layers 2 instead of 4" in inference_report.differing(result)


def test_growth_has_every_size_and_its_parts(result: dict[str, Any]) -> None:
    growth = result["growth"]
    assert growth["skipped"] == {}
    for over, sizes in (("tokens", ["16", "32"]), ("layers", ["1"])):
        assert set(growth[over]) == {"stock", *SERVED}
        for key, by_size in growth[over].items():
            assert list(by_size) == list(growth["floor_ms"][over]) == sizes
            assert all(set(cell) == ({"ms"} if key == "stock" else {"ms", *PARTS}) for cell in by_size.values())


def test_plots_lie_beside_the_result(result: dict[str, Any], path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("parts-float32", "parts-bfloat16", "tokens", "tokens-parts", "layers", "layers-parts"):
        assert path.with_name(f"inference-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_timelines_lie_beside_the_result(result: dict[str, Any], path: Path, dtype: str) -> None:
    for placement in SERVED:
        events = json.loads(path.with_name(f"trace-{dtype}-{placement}.json").read_text())["traceEvents"]
        calls = [event for event in events if event["ph"] == "b"]
        assert len(calls) == 2 * PLACEMENTS[placement].round_trips(LAYERS)  # a prefill's and a step's


def test_the_short_table_names_each_and_what_was_missed(
    result: dict[str, Any], path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inference_summary.main([str(path)]) == 0
    shown = capsys.readouterr().out
    missed = [bar for bar in result["bars"] if not bar["met"]]
    assert all(key in shown for key in ("floor", "stock", *SERVED))
    assert shown.count("missed: ") == len(missed)


# --- without a run --------------------------------------------------------------------------------------------


def test_work_counts_the_weights_of_the_real_dimensions() -> None:
    spec = Spec("llama-1b", 16, "bfloat16", "meta", 1)
    model = build(spec)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    decode = work(spec, 1, 1024)
    assert decode.nbytes == 2 * (linear + 16 * 2 * 512 * 1025)
    assert decode.flops == 2 * linear + 16 * 4 * 2048 * 1025
    head = 2048 * 128256
    assert work(spec, 1024, 0).flops == 2 * 1024 * (linear - head) + 2 * head + 16 * 4 * 2048 * 1024 * 1025 // 2


def test_the_floor_is_the_slower_of_flops_and_bytes() -> None:
    one = work(Spec("tiny", 1, "float32", "cpu", 1), 1, 0)
    assert one.floor_s(Peaks(1.0, 1e30, None)) == one.flops
    assert one.floor_s(Peaks(1e30, 1.0, None)) == one.nbytes


def test_cuda_bars_are_milliseconds_beside_the_floor() -> None:
    cell = {"split_ms": 9.0, "overhead_us_per_trip": 5.0, "call_overhead_us_per_trip": 4.0, "ring_share": 1.0}
    run = {
        "floor_ms": {"prefill": 3.0, "decode": 0.6},
        "splits": {key: {"baseline": False, "prefill": cell, "decode": cell} for key in ("ops", "fused", "layer")},
    }
    options = {"device": "cuda:0", "tokens": 1024, "layers": 16, "model": "llama-1b"}
    result = {"options": options, "runs": {"bfloat16": run}}
    found = {bar.text: bar.met for bar in inference_report.bars(result)}
    assert inference_report.differing(result) == ""
    assert found["bfloat16, prefill 1024, fused, ms (floor 3.00)"] is True
    assert found["bfloat16, prefill 1024, layer, ms (floor 3.00)"] is False
    assert found["bfloat16, prefill 1024, ops, ms (floor 3.00)"] is True
    assert found["bfloat16, decode at 1024, fused, ms (floor 0.60)"] is False


def test_sizes_that_would_take_too_much_are_left_out() -> None:
    spec = Spec("llama-1b", 4, "float32", "cpu", 2)
    stock = {"128": {"ms": 10.0}, "256": {"ms": 25.0}}
    assert inference_growth.too_much(spec, 128, {}, stock) is None
    assert inference_growth.too_much(spec, 256, {"128": {"ms": 23e3}}, stock) is None
    assert inference_growth.too_much(spec, 256, {"128": {"ms": 25e3}}, stock) == "the size before took 25 s"
    assert "MiB of free memory" in (inference_growth.too_much(spec, 1 << 20, {}, stock) or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "flags", "--no-baselines"], "contradict each other"),
        (["--device", "tpu"], "--device tpu is unknown; give cpu or cuda:0"),
        (["--placement", "local"], "invalid choice: 'local'"),
        (["--tokens", "0"], "'0' is no number of 1 or more"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults_are_the_promised_setting() -> None:
    options = parse_arguments([])
    assert (options.layers, options.tokens, options.dtype) == (4, 1024, list(DTYPES))
    assert (options.placement, options.baseline) == (list(SERVED), ["msgpack", "flags"])


def test_the_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or f"/usr/bin/{tool}")
    place = {"PATH": str(tmp_path), "VENV": str(tmp_path / "venv"), "RESULTS": str(tmp_path / "results")}
    command = [str(tmp_path / "bash"), str(ROOT / "benchmarks" / "gpu.sh")]
    run = subprocess.run(command, env=place, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == 1
    assert run.stderr == "gpu.sh: no NVIDIA GPU here (there is no nvidia-smi); run it on a machine that has one\n"
    assert sorted(os.listdir(tmp_path)) == ["bash", "dirname"]


# --- the baselines --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_model("qwen2", tie_word_embeddings=False)


@pytest.fixture(params=list(baselines.TITLES))
def address(request: pytest.FixtureRequest, stock: Any, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A baseline that is being served, by key, and where."""
    skipped: dict[str, str] = {}
    with baselines.addresses([request.param], tmp_path, skipped) as found:
        if skipped:
            pytest.skip(str(skipped))
        with baselines.serving(stock, "cpu", found):
            yield request.param, found[request.param]


def test_a_baseline_decodes_with_a_cache_as_stock_does(address: tuple[str, Any], stock: Any) -> None:
    ids = token_ids(1, 15)
    model = baselines.connect(*address)
    try:
        tokens, logits = Timed(stock, "cpu").logits(ids, 4)
        found_tokens, found = Timed(model, "cpu").logits(ids, 4)
    finally:
        model.close()
    assert torch.equal(found_tokens, tokens)
    assert (found - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_a_baseline_sends_large_tensors_over_zeromq(address: tuple[str, Any]) -> None:
    client = BaselineClient(*address)
    try:
        a, b = torch.randn(1, 3 << 20), torch.randn(2, 3 << 20)  # 12 MiB and 24 MiB
        assert torch.allclose(client.matmul(a, b, transposed=True), a @ b.T, rtol=1e-3)
        small = client.stats["shm_bytes"]
        assert client.stats["zmq_bytes"] >= a.nbytes + b.nbytes
    finally:
        client.close()
    assert small == (8 if address[0] == "flags" else 0)  # the product, two float32


def test_a_baselines_server_says_what_it_could_not_do(address: tuple[str, Any]) -> None:
    client = BaselineClient(*address)
    try:
        with pytest.raises(BaselineError, match="could not answer modules: KeyError"):
            client.module("gpu_linear", "no.such.module", torch.zeros(1, 48))
        assert client.matmul(torch.ones(1, 2), torch.ones(2, 1)).item() == 2.0  # and goes on
    finally:
        client.close()


@pytest.mark.parametrize(
    ("seconds", "told"),
    [([1.0, 1.02, 0.99], []), ([1.0, 1.3, 1.3], ["float32 ops decode (by 23%)"]), ([1.0, 1.0, 9.0], []), ([0.5], [])],
)
def test_stock_that_varies_is_named(seconds, told):
    steady = {"stock_s": [2.0, 2.1]}
    result = {"runs": {"float32": {"splits": {"ops": {"prefill": steady, "decode": {"stock_s": seconds}}}}}}
    assert inference_report.unsteady(result) == told
