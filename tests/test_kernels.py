"""The operators in C against float64 references and the torch formulas, on whatever a tensor can hold."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from tsqp import _formulas, _kernels, ops
from tsqp.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16]
#: Relative: a unit in the last place of bfloat16; a few roundings of float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
SIZES = [*range(1, 131, 6), 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 130]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: torch.Tensor, reference: torch.Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    largest = reference[reference.isfinite()].abs().max().item() if reference.isfinite().any() else 1.0
    torch.testing.assert_close(
        found.double(), reference.double(), rtol=tolerance, atol=tolerance * largest * 0.1 + 1e-35, equal_nan=True
    )


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = ops.get_threads()
    ops.set_threads(2)
    yield
    ops.set_threads(before)


# ---- against references -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_any_width(dtype: torch.dtype) -> None:
    for width in [*SIZES, 2048, 8191]:
        x, weight = randn(3, width, dtype=dtype) * 3, randn(width, seed=1, dtype=dtype)
        residual = randn(3, width, seed=2, dtype=dtype)
        found = _kernels.rms_norm(x, weight, 1e-6, None, None, None)
        assert isinstance(found, torch.Tensor)
        wide = x.double()
        assert_near(found, weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
        normed, total = ops.rms_norm(x, weight, 1e-6, residual)
        theirs = _formulas.rms_norm(x, weight, 1e-6, residual, None, None)
        assert torch.equal(total, theirs[1])
        torch.testing.assert_close(normed, theirs[0], rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_of_any_size(dtype: torch.dtype) -> None:
    for size in [*SIZES, 100_003]:
        gate, up = randn(size, dtype=dtype) * 9, randn(size, seed=1, dtype=dtype)
        found = _kernels.silu_mul(gate, up, None)
        assert found is not None
        wide = gate.double()
        assert_near(found, wide * torch.sigmoid(wide) * up.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_behind", [False, True])
def test_apply_rotary_of_any_width_and_strides(dtype: torch.dtype, heads_behind: bool) -> None:
    """As transformers passes them: q and k are views of [B, N, H, D]; equal to the last bit."""
    for dim in [2, 6, 16, 30, 32, 34, 64, 96, 128, 130]:
        for tables in (1, 2):
            q = randn(2, 5, 6, dim, dtype=dtype).transpose(1, 2)
            k = randn(2, 5, 3, dim + 4, seed=1, dtype=dtype)[..., :dim].transpose(1, 2)
            cos, sin = randn(tables, 5, dim, seed=2, dtype=dtype), randn(tables, 5, dim, seed=3, dtype=dtype)
            heads = 1
            if heads_behind:
                q, k, heads = q.transpose(1, 2), k.transpose(1, 2), 2
            found = _kernels.apply_rotary(q, k, cos, sin, heads, None, None)
            assert found is not None
            theirs = _formulas.apply_rotary(q, k, cos, sin, heads, None)
            assert torch.equal(found[0], theirs[0])
            assert torch.equal(found[1], theirs[1])
            ops.apply_rotary_(q, k, cos, sin, heads)
            assert torch.equal(q, theirs[0])
            assert torch.equal(k, theirs[1])


def softmax_reference(
    scores: torch.Tensor, mask: torch.Tensor | None, scale: float, first: int | None, window: int | None
) -> torch.Tensor:
    queries, keys = scores.shape[-2:]
    start = keys - queries if first is None else first
    position, key = torch.arange(start, start + queries)[:, None], torch.arange(keys)
    hidden = key > position if mask is None else torch.zeros(queries, keys, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (key <= position - window)
    wide = scores.double() * scale
    if mask is not None:
        wide = wide.masked_fill(~mask, torch.finfo(torch.float32).min) if mask.dtype == torch.bool else wide + mask
    return torch.softmax(wide.masked_fill(hidden, -math.inf), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
def test_causal_softmax_of_any_width(dtype: torch.dtype, result: torch.dtype) -> None:
    for keys in [*SIZES, 1000, 5001]:
        queries = min(keys, 5)
        scores = randn(2, 3, queries, keys, dtype=dtype) * 4
        for first, window in ((None, None), (0, None), ((keys - queries) // 2, 1 + keys // 3), (None, 1)):
            found = _kernels.causal_softmax(scores, None, 0.3, True, result, first, window, None)
            assert found is not None
            assert found.dtype == result
            assert_near(found, softmax_reference(scores, None, 0.3, first, window))


@pytest.mark.parametrize("shape", [(4, 9), (1, 9), (2, 1, 4, 9), (2, 3, 4, 9), (1, 1, 1, 9), (3, 1, 9), (9,)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
def test_causal_softmax_masks_broadcast(shape: tuple[int, ...], kind: torch.dtype) -> None:
    scores = randn(2, 3, 4, 9)
    mask = randn(*shape, seed=1).to(kind) if kind.is_floating_point else randn(*shape, seed=1) > -0.5
    for window in (None, 3):
        found = _kernels.causal_softmax(scores, mask, 0.7, True, None, None, window, None)
        assert found is not None
        assert_near(found, softmax_reference(scores, mask, 0.7, None, window))


def test_a_tile_is_the_rows_of_the_whole() -> None:
    scores, mask = randn(1, 2, 40, 40), randn(1, 1, 40, 40, seed=1)
    whole, masked = ops.causal_softmax(scores), ops.causal_softmax(scores, mask)
    for begin in range(0, 40, 10):
        tile = scores[:, :, begin : begin + 10]
        assert torch.equal(ops.causal_softmax(tile, first=begin), whole[:, :, begin : begin + 10])
        short = tile[..., : begin + 10]  # only the keys that the tile sees
        seen = ops.causal_softmax(short, first=begin)
        assert torch.equal(seen, whole[:, :, begin : begin + 10, : begin + 10])
        rows = mask[:, :, begin : begin + 10]
        assert torch.equal(ops.causal_softmax(tile, rows, first=begin), masked[:, :, begin : begin + 10])


def test_causal_softmax_of_strided_scores() -> None:
    scores = randn(2, 6, 3, 20).transpose(1, 2)[..., 2:15]
    found = _kernels.causal_softmax(scores, None, 1.0, True, None, None, None, None)
    assert found is not None
    assert torch.equal(found, ops.causal_softmax(scores.contiguous()))


# ---- what is no ordinary number ---------------------------------------------------------------------------


def test_causal_softmax_of_odd_rows() -> None:
    scores = randn(6, 50)
    scores[0] = -math.inf
    scores[1, 3] = math.nan
    scores[2, 4] = math.inf
    scores[3, 5] = -math.inf
    scores[4] = 1e-42
    scores[5, 6] = 3e38
    found = ops.causal_softmax(scores, causal=False)
    torch.testing.assert_close(found, torch.softmax(scores, -1), equal_nan=True)
    hidden = ops.causal_softmax(scores, first=10)
    for row in range(6):
        assert not hidden[row, 11 + row :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_and_silu_mul_of_odd_numbers(dtype: torch.dtype) -> None:
    x = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [1e-42, 1e-43], [0.0, 0.0], [1e30, -1e30]]).to(dtype)
    weight = torch.tensor([0.5, 2.0]).to(dtype)
    theirs = _formulas.rms_norm(x, weight, 1e-6, None, None, None)
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ops.rms_norm(x, weight), theirs, equal_nan=True)
    gate = torch.tensor([math.nan, math.inf, -math.inf, -1e30, 1e30, 0.0, 1e-42, -90.0]).to(dtype)
    found = ops.silu_mul(gate, torch.ones_like(gate))
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), equal_nan=True)


# ---- out= -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_results_go_where_they_are_told(dtype: torch.dtype) -> None:
    x, weight, residual = randn(4, 70, dtype=dtype), randn(70, seed=1, dtype=dtype), randn(4, 70, seed=2, dtype=dtype)
    normed, total = ops.rms_norm(x, weight, 1e-6, residual)
    out, kept = torch.empty_like(x), residual.clone()
    found = ops.rms_norm(x, weight, 1e-6, residual=kept, out=out, total=kept)
    assert found[0] is out
    assert found[1] is kept
    assert torch.equal(out, normed)
    assert torch.equal(kept, total)
    gated = ops.silu_mul(x, residual)
    assert ops.silu_mul(x, residual, out=out) is out
    assert torch.equal(out, gated)
    over = x.clone()
    assert torch.equal(ops.silu_mul(over, residual, out=over), gated)
    probs = ops.causal_softmax(x)
    over = x.clone()
    assert ops.causal_softmax(over, out=over) is over
    assert torch.equal(over, probs)
    over = x.clone()
    assert torch.equal(ops.rms_norm(over, weight, out=over), ops.rms_norm(x, weight))


def misuses(x: torch.Tensor) -> list[torch.Tensor]:
    return [
        torch.empty(4, 19, dtype=x.dtype),
        torch.empty(4, 20, dtype=torch.float64),
        torch.empty(20, 4, dtype=x.dtype).T,
        torch.empty(4, 40, dtype=x.dtype)[:, ::2],
        torch.empty(1, 20, dtype=x.dtype).expand(4, 20),
        torch.empty(4, 20, dtype=x.dtype, requires_grad=True),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_out_that_does_not_fit_is_refused(number: int, dtype: torch.dtype) -> None:
    x = randn(4, 20, dtype=dtype)
    out = misuses(x)[number]
    shape = out.shape
    calls: list[Callable[[], object]] = [
        lambda: ops.rms_norm(x, x[0].clone(), out=out),
        lambda: ops.rms_norm(x, x[0].clone(), residual=x, total=out),
        lambda: ops.silu_mul(x, x, out=out),
        lambda: ops.causal_softmax(x, out=out),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"out|total"):
            call()
    assert out.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_out_that_overlaps_in_part_is_refused(dtype: torch.dtype) -> None:
    room = randn(200, dtype=dtype)
    x, out, weight = room[:80].view(4, 20), room[20:100].view(4, 20), room[100:120]
    with pytest.raises(ConfigError, match="overlaps"):
        ops.rms_norm(x, weight, out=out)
    with pytest.raises(ConfigError, match="overlaps"):
        ops.rms_norm(x, weight, out=room[110:190].view(4, 20))
    with pytest.raises(ConfigError, match="overlaps"):
        ops.rms_norm(x, weight, residual=x, out=x, total=x)
    with pytest.raises(ConfigError, match="overlaps"):
        ops.silu_mul(x, x, out=out)
    with pytest.raises(ConfigError, match="overlaps"):
        ops.causal_softmax(x, out=out)
    with pytest.raises(ConfigError, match="overlaps"):
        ops.causal_softmax(room[100:180].view(4, 20), x, out=x)
    q = room[:96].view(1, 2, 6, 8)
    table = torch.ones(1, 6, 8, dtype=dtype)
    with pytest.raises(ConfigError, match="overlaps"):
        ops.apply_rotary_(q, q, table, table)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"first": -1}, "first"), ({"first": 3}, "key for each position"), ({"window": 0}, "window")],
)
def test_positions_that_can_not_be_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ops.causal_softmax(randn(2, 4), **options)  # type: ignore[arg-type]


# ---- what the kernels leave to torch ----------------------------------------------------------------------


def test_a_gradient_flows() -> None:
    x, weight = randn(3, 8).requires_grad_(), randn(8, seed=1).requires_grad_()
    ops.silu_mul(ops.rms_norm(x, weight), ops.causal_softmax(x[None], causal=False)[0]).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    with torch.no_grad():
        assert not ops.rms_norm(x, weight).requires_grad
    with pytest.raises(ConfigError, match="gradient"):
        ops.silu_mul(x, x, out=torch.empty(3, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_computed_by_torch(dtype: torch.dtype) -> None:
    x = randn(3, 8, dtype=dtype)
    assert _kernels.silu_mul(x, x, None) is None
    assert torch.equal(ops.silu_mul(x, x), torch.nn.functional.silu(x) * x)


def test_odd_strides_and_empty_tensors_are_computed_by_torch() -> None:
    x = randn(8, 3).T
    assert torch.allclose(ops.rms_norm(x, torch.ones(8)), ops.rms_norm(x.contiguous(), torch.ones(8)))
    assert torch.allclose(ops.causal_softmax(x), ops.causal_softmax(x.contiguous()))
    assert ops.silu_mul(torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)
    assert ops.rms_norm(torch.empty(0, 4), torch.ones(4)).shape == (0, 4)
    assert ops.causal_softmax(torch.empty(2, 0, 4)).shape == (2, 0, 4)


# ---- threads ----------------------------------------------------------------------------------------------


def test_threads_change_no_number() -> None:
    scores = randn(4, 300, 300)
    found = []
    for count in (1, 2, 3):
        ops.set_threads(count)
        found.append(ops.causal_softmax(scores))
        assert _kernels.threads_running() <= count - 1
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with pytest.raises(ConfigError, match="256"):
        ops.set_threads(0)


def test_callers_of_several_threads() -> None:
    inputs = [randn(3, 200, 200, seed=seed) for seed in range(4)]
    expected = [ops.causal_softmax(scores) for scores in inputs]
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(30):
            if not torch.equal(ops.causal_softmax(inputs[number]), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_hostile_writer_spoils_numbers_only() -> None:
    """Somebody else writes the inputs while the operators read them; a row is still computed from one reading."""
    scores, gate, weight = randn(8, 128, 256), randn(512, 512), torch.ones(512)
    stop = threading.Event()

    def write() -> None:
        numbers = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, 1e-42, 1.0])
        while not stop.is_set():
            for number in numbers:
                scores.fill_(number)
                gate.fill_(number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(60):
            probs = ops.causal_softmax(scores)
            assert not probs[..., -1][:, :-1].any(), "what is hidden is 0"
            sums = probs.double().sum(-1)
            assert ((sums - 1).abs() < 1e-3).logical_or(sums.isnan()).all(), "a row was read twice"
            ops.rms_norm(gate, weight)
            ops.silu_mul(gate, gate)
    finally:
        stop.set()
        writer.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_starts_its_own_threads() -> None:
    scores = randn(4, 300, 300)
    expected = ops.causal_softmax(scores)
    assert _kernels.threads_running() == 1
    child = os.fork()
    if child == 0:
        clean = _kernels.threads_running() == 0
        same = torch.equal(ops.causal_softmax(scores), expected)
        os._exit(0 if clean and same and _kernels.threads_running() == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(ops.causal_softmax(scores), expected)


@pytest.mark.parametrize(("setting", "expected"), [("3", "3"), (None, "1"), ("x", "whole number"), ("-1", "negative")])
def test_threads_are_settled_by_the_environment(setting: str | None, expected: str) -> None:
    code = "import torch; torch.set_num_threads(1); from tsqp import ops; print(ops.get_threads())"
    environment = {name: value for name, value in os.environ.items() if name != "TSQP_THREADS"}
    if setting is not None:
        environment["TSQP_THREADS"] = setting
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert expected in run.stdout + run.stderr
