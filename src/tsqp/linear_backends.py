"""How a served model's linear modules are computed on a CPU: by torch, or by oneDNN where that is faster here.

Which is faster depends on the machine: torch gives float32 to MKL, which uses half of what some processors can do, and
lays a bfloat16 weight out anew in every call. So every shape is measured once, when the model is loaded. oneDNN can
take the weight as it lies, or *packed*: laid out once as its kernels read it, which takes the weight's memory a second
time unless the plain one is given up.

The operators are those ``torch.compile`` emits for a CPU (``torch/_inductor/fx_passes/mkldnn_fusion.py``). Their names
are torch's own business: where they are missing, fail, or compute something else, torch computes as ever.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .loading import ServedModel, ServedModule, torch_product

log = logging.getLogger("tsqp.server")

Product = Callable[[Tensor], Tensor]

#: What ``GPUServer(linear_backend=)`` takes.
BACKENDS = ("auto", "torch", "onednn")
#: The ways a module is computed, as ``GPUServer.stats`` names them.
TORCH, ONEDNN, PACKED = "torch", "onednn", "onednn_packed"
#: A weight of fewer elements lies in a core's cache, and what is called around its product takes longer.
_SMALL = 1 << 18
#: Rows of the inputs that are measured: a decode step, and enough to tell a prefill's speed.
_ROWS = (1, 64)
#: The same for weights of more elements than this: an LM head sees few rows.
_LARGE, _ROWS_OF_LARGE = 64 << 20, (1, 8)
_REPETITIONS = 4
#: Two figures of one operation differ by so much without a reason: another way has to gain more.
_GAIN = 0.9
#: How far two correct results may differ, in the magnitude of the largest element.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: What torch raises for a dtype or processor that oneDNN has no kernel for, or an operator it does not have.
_UNSUPPORTED = (RuntimeError, NotImplementedError, AttributeError, TypeError)


def choose_backends(
    served: ServedModel,
    backend: str = "auto",
    *,
    pack: bool | None = None,
    owned: bool = False,
    threads: int | None = None,
    compiled: bool = False,
) -> dict[str, int]:
    """Settles how each linear module is computed, by measuring; returns the number of modules per way.

    ``backend``: ``auto``, ``torch`` (nothing is changed) or ``onednn`` (without measuring, wherever it can). ``pack``:
    whether weights may be packed; None: those whose plain form can be given up, which are the weights of an ``owned``
    model (nobody else computes with it) that no other module shares. ``threads`` are torch's for the measurement.
    ``compiled``: the layers' MLPs are left as they are where the server runs them whole; torch.compile takes them.
    A model that is not owned is not changed: its larger modules are copied, their weights shared.

    Raises :class:`~tsqp.errors.ConfigError` for an unknown backend, and for ``onednn`` where this torch has none.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"linear_backend {backend!r} is unknown; give {', '.join(BACKENDS)}")
    linears = {name: module for name, module in served.modules.items() if module.linear is not None}
    if backend == "torch" or served.device.type != "cpu" or not _available():
        if backend == "onednn":
            raise ConfigError("linear_backend 'onednn' needs a model on the CPU and a torch with oneDNN; give auto")
        return {TORCH: len(linears)} if linears else {}
    mlps = tuple(f"{module.name}." for module in served.layout.mlp) if compiled else ()
    plain = frozenset(name for name in linears if name.startswith(mlps)) if mlps else frozenset()
    chooser = _Chooser(backend, pack, owned, _shared_weights(served))
    with _threads(threads), torch.no_grad():
        ways = {name: chooser.settle(module, name in plain) for name, module in linears.items()}
        calls = {name: linears[name].call for name, way in ways.items() if way != TORCH and name not in plain}
        fused = served.fused if owned or not calls else _copies(served.fused)
        if fused is not None:
            _install(fused, calls)
            served.fused = fused
        _give_up(served, chooser.unused)
    return dict(Counter(ways.values()))


class _Chooser:
    """Measures each shape once and settles modules by it."""

    def __init__(self, backend: str, pack: bool | None, owned: bool, shared: frozenset[int]) -> None:
        self._backend, self._pack, self._owned, self._shared = backend, pack, owned, shared
        self._found: dict[Any, str] = {}
        #: Those whose plain weight nobody needs any more.
        self.unused: list[nn.Linear] = []

    def settle(self, module: ServedModule, keep_plain: bool) -> str:
        """Sets the module's ``call``; returns the way it is computed."""
        linear = module.linear
        assert linear is not None
        weight = linear.weight.detach()
        alone = self._owned and id(linear.weight) not in self._shared and not keep_plain
        may_pack = alone if self._pack is None else self._pack
        key = (weight.shape, weight.dtype, linear.bias is None, may_pack)
        way = self._found.get(key)
        if way is None:
            products = self._candidates(linear, may_pack)
            way = self._found[key] = self._fastest(products, linear)
        else:
            products = working_products(linear, (way,))
        if way != TORCH:
            product = products.get(way)
            if product is None:
                return TORCH
            module.call = product
        if way == PACKED and alone:
            self.unused.append(linear)
        return way

    def _candidates(self, linear: nn.Linear, may_pack: bool) -> dict[str, Product]:
        if linear.weight.numel() < _SMALL and self._backend == "auto":
            return {TORCH: torch_product(linear)}
        return working_products(linear, (TORCH, ONEDNN, *((PACKED,) if may_pack else ())))

    def _fastest(self, products: dict[str, Product], linear: nn.Linear) -> str:
        if len(products) == 1:
            return TORCH
        if self._backend == "onednn":
            return next(way for way in (PACKED, ONEDNN, TORCH) if way in products)
        rows = _ROWS_OF_LARGE if linear.weight.numel() > _LARGE else _ROWS
        costs = _costs(products, linear, rows)
        best = TORCH
        for way in (ONEDNN, PACKED):  # each asks for more than the one before
            if way in costs and costs[way] < _GAIN * costs[best]:
                best = way
        return best


def _available() -> bool:
    return bool(torch.backends.mkldnn.is_available() and getattr(torch.backends.mkldnn, "enabled", True))


def _shared_weights(served: ServedModel) -> frozenset[int]:
    """Ids of weights that several modules compute with."""
    counts = Counter(id(module.weight) for module in served.modules.values())
    return frozenset(each for each, count in counts.items() if count > 1)


def working_products(linear: nn.Linear, ways: tuple[str, ...]) -> dict[str, Product]:
    """The ways to compute a module that work and give the right result, torch's own among them."""
    plain = torch_product(linear)
    found = {}
    for way in ways:
        if way == TORCH:
            found[way] = plain
            continue
        try:
            product = _onednn_product(linear, way == PACKED)
            good = _agrees(product, plain, linear)
        except _UNSUPPORTED as error:
            log.debug("oneDNN can't compute a linear module of %s: %s", linear.weight.dtype, error)
            continue
        if good:
            found[way] = product
    return found


def _onednn_product(linear: nn.Linear, packed: bool) -> Product:
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if packed:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    operator = torch.ops.mkldnn._linear_pointwise.default
    width = linear.out_features

    def product(x: Tensor) -> Tensor:
        if x.dim() < 2 or not x.numel():  # which oneDNN does not take
            if not x.numel():
                return x.new_empty((*x.shape[:-1], width))
            out: Tensor = operator(x.unsqueeze(0), weight, bias, "none", [], "")
            return out.squeeze(0)
        return operator(x, weight, bias, "none", [], "")

    return product


def _agrees(product: Product, reference: Product, linear: nn.Linear) -> bool:
    x = _example(linear, 3)
    expected = reference(x).float()
    limit = _TOLERANCES[linear.weight.dtype] * expected.abs().max()
    return bool(((product(x).float() - expected).abs() <= limit).all())


def _example(linear: nn.Linear, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(1, rows, linear.in_features, generator=generator).to(linear.weight.dtype)


def _costs(products: dict[str, Product], linear: nn.Linear, rows: tuple[int, ...]) -> dict[str, float]:
    """For each way the geometric mean of its times at the ``rows``: each counts as much. The ways take turns, so that
    what else the machine does falls on all.
    """
    costs = dict.fromkeys(products, 1.0)
    for count in rows:
        x = _example(linear, count)
        for product in products.values():
            product(x)
        spent = dict.fromkeys(products, math.inf)
        for _ in range(_REPETITIONS):
            for way, product in products.items():
                spent[way] = min(spent[way], _seconds(product, x))
        for way in products:
            costs[way] *= spent[way] ** (1 / len(rows))
    return costs


def _seconds(product: Product, x: Tensor) -> float:
    begin = time.perf_counter()
    product(x)
    return time.perf_counter() - begin


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copies(modules: dict[str, nn.Module]) -> dict[str, nn.Module] | None:
    """Copies of the modules the server runs whole that share every tensor with them; None where that fails."""
    memo: dict[int, Any] = {}
    for module in modules.values():
        memo |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        memo |= {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    try:
        return {name: copy.deepcopy(module, memo) for name, module in modules.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        log.warning("the model's layers can't be copied (%s): run whole, they compute as before", error)
        return None


def _install(fused: dict[str, nn.Module], calls: dict[str, Product]) -> None:
    """Lets the modules the server runs whole compute their linear modules by ``calls``."""
    for name, module in fused.items():
        for inner, part in module.named_modules():
            call = calls.get(f"{name}.{inner}" if inner else name)
            if call is not None:
                part.forward = call


def _give_up(served: ServedModel, linears: list[nn.Linear]) -> None:
    """Frees the plain weights of packed modules; the parameters keep shape and dtype, and hold NaN.

    A family may use a weight by itself, past its module. So a forward is compared with one before; where it differs,
    all weights are kept.
    """
    if not linears:
        return
    before = _outputs(served)
    kept = [linear.weight.data for linear in linears]
    for linear in linears:
        weight = linear.weight
        weight.data = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)
    if before is None or _close(before, _outputs(served)):
        return
    log.warning("the model uses weights outside their linear modules: they are kept beside the packed ones")
    for linear, data in zip(linears, kept, strict=True):
        linear.weight.data = data


def _outputs(served: ServedModel) -> Tensor | None:
    """The last hidden state of a short forward, of a model that has layers the server runs whole, else None."""
    if not served.fused:
        return None
    ids = torch.ones(1, 2, dtype=torch.int64)
    found: Tensor = served.model.base_model(input_ids=ids, attention_mask=ids, use_cache=False)[0]
    return found.float()


def _close(first: Tensor, second: Tensor | None) -> bool:
    assert second is not None
    return bool(torch.allclose(first, second, rtol=0.0, atol=1e-3 * float(first.abs().max())))
