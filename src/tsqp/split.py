"""A transformers model whose heavy modules run on the server.

The modelling code stays transformers' own. Modules are replaced per instance by stand-ins
(:mod:`tsqp.remote`), attention is chosen by name (:mod:`tsqp.attention`), and every change is written down in
an :class:`~tsqp.attachment.Attachment`, which takes all of them back.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import building, fused, kept_embedding
from .attachment import Attachment
from .attention import ATTENTION_NAME, MODULE_ATTRIBUTE, SplitAttention
from .client import GPUClient, InitInfo
from .errors import ConfigError, ModelError
from .instrument import instrument
from .placement import EMBEDDING, LINEAR, LM_HEAD, Placement, get_placement
from .plain_meta import PlainMeta
from .remote import RemoteEmbedding, RemoteLinear, RemoteModule, SiblingGroup
from .tiles import Tiling
from .trusted_weights import from_options

#: The attribute of a split model that holds its :class:`Attachment`.
_ATTRIBUTE = "tsqp_attachment"
_LAYER_NAME = re.compile(r"(.+?)\.(\d+)\.(.+)")
_CLIENT_OPTIONS = ("connect_timeout", "wait", "perf_log", "curve_key", "curve_server")
_TRUST_OPTIONS = ("trusted_weights", "trusted_digest")
_OPTIONS = ("attn_implementation", "tile_bytes", "mlp_tile_bytes", *_TRUST_OPTIONS, *_CLIENT_OPTIONS)


def from_pretrained(
    path: str | os.PathLike[str] | None = None,
    endpoint: str | None = None,
    placement: str | Placement = "ops",
    wire_dtype: str = "auto",
    dtype: str | torch.dtype = "auto",
    client: GPUClient | None = None,
    timeout: float = 30.0,
    keep_embedding: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """A transformers model, split: forward, ``generate``, caches and streamers as with any other.

    ``path`` is a local checkpoint directory of which only the config is read; None takes the config from the
    server. ``client`` is one to use (and to leave open), else one is connected to ``endpoint`` with
    ``wire_dtype`` and ``timeout`` seconds per call, and closed by ``model.close()``. ``dtype`` is what the
    runner computes in; ``auto`` is the server's. ``options``: ``attn_implementation`` (of a placement that
    leaves attention in the runner), ``connect_timeout``, ``wait``, ``perf_log``, ``curve_key`` and ``curve_server``
    (key files, see :func:`connect`), ``tile_bytes`` and ``mlp_tile_bytes`` (the attention of ``ops``, and gated MLPs,
    are worked on in row tiles of so many bytes where a prompt is long, so that server and runner overlap; ``auto``
    measures, 0 does without), ``trusted_weights`` and ``trusted_digest``. With placement ``local`` this is
    ``AutoModelForCausalLM.from_pretrained(path)``: no server, ``options`` go there.

    ``keep_embedding`` leaves Embedding in the runner, so that token ids are never sent. Its table is read from the
    safetensors in ``path``, where they have it, else asked for from the server before any prompt. The server can
    still tell tokens from the hidden states and logits it gets: this alone is no confidentiality.

    ``trusted_weights`` is a file of ``tsqp trust`` and ``trusted_digest`` the ``"sha256:HEX"`` that it printed
    (default: ``TSQP_TRUSTED_DIGEST``): config, generation config, module sizes, norms and all else the runner computes
    with come from that file, and what the server says of its model is only compared with it, before any prompt.
    ``path``, if given, has to agree, too. Precision stays the server's choice (pin it with ``dtype``), and what the
    server computes is not checked. ``keep_embedding`` takes its table from that file, too, if it was made with
    ``tsqp trust --embedding``, and else refuses.

    Logits equal the stock model's to 1e-4 of the largest one in float32; a bfloat16 or float16 model is as
    far from the exact result as the stock model in that dtype, within a factor of two. A wire narrower than a
    float32 model at both ends costs up to 0.005 (float16) or 0.04 (bfloat16) of the largest logit.

    The model has ``tsqp_client``, ``tsqp_placement`` and ``close()``. Raises
    :class:`~tsqp.errors.ConfigError`, :class:`~tsqp.errors.ConnectError`,
    :class:`~tsqp.errors.ModelNotFoundError`, :class:`~tsqp.errors.ModelError`,
    :class:`~tsqp.errors.UntrustedServerError` and, for parameters no placement covers,
    :class:`~tsqp.errors.UnplacedParameterError`.
    """
    chosen = get_placement(placement, keep_embedding)
    if not chosen.needs_server:
        return _local_model(path, dtype, chosen, options)
    unknown = set(options) - set(_OPTIONS)
    if unknown:
        raise ConfigError(f"from_pretrained has no option {', '.join(sorted(unknown))}")
    if client is not None and (endpoint is not None or wire_dtype not in ("auto", client.wire_dtype)):
        raise ConfigError("a client has its endpoint and wire_dtype already; give them to the client only")
    trust = from_options(*map(options.get, _TRUST_OPTIONS))
    if trust is not None and path is not None:
        trust.check_checkpoint(path)
    owned = client is None
    if client is None:
        connecting = {name: options[name] for name in _CLIENT_OPTIONS if name in options}
        client = GPUClient(endpoint, timeout=timeout, wire_dtype=wire_dtype, **connecting)
    try:
        info = client.init()
        if trust is not None:
            path, info = None, trust.checked(info)
        attention = options.get("attn_implementation") if chosen.attention == "runner" else None
        model = building.build_skeleton(path, info, building.resolve_dtype(dtype, info), attention)
        sizes = {name: options[name] for name in ("tile_bytes", "mlp_tile_bytes") if name in options}
        tiling = Tiling(**sizes, slot_bytes=client.slot_bytes)
        tables = partial(kept_embedding.tables, path=path, pinned=trust is not None)
        _install(model, client, info, chosen, owns_client=owned, skeleton=True, tiling=tiling, tables=tables)
    except BaseException:
        if owned:
            client.close()
        raise
    return model


def attach(
    model: PreTrainedModel,
    client: GPUClient,
    placement: str | Placement = "ops",
    tile_bytes: int | str = "auto",
    mlp_tile_bytes: int | str = "auto",
    keep_embedding: bool = False,
    trusted_weights: str | os.PathLike[str] | None = None,
    trusted_digest: str | None = None,
) -> PreTrainedModel:
    """Splits a loaded stock model in place; :func:`detach` (or ``model.close()``) gives it back as it was.

    The client's server has to serve the same model. The replaced modules, with their weights, are set aside,
    not freed. With ``keep_embedding`` the model's own embedding stays where it is: token ids are never sent. With
    ``trusted_weights`` and ``trusted_digest`` (see :func:`from_pretrained`) both the model and what the server says of
    its own are compared with that file first. Returns ``model``. Raises :class:`~tsqp.errors.ModelError` where the
    model is attached already, does not match the server's or the file's or can't be split, and
    :class:`~tsqp.errors.UntrustedServerError`; the model is unchanged then.
    """
    chosen = get_placement(placement, keep_embedding)
    if not chosen.needs_server:
        raise ConfigError(f"placement {chosen.name!r} uses no server; use the model as it is")
    tiling = Tiling(tile_bytes, mlp_tile_bytes, client.slot_bytes)
    trust = from_options(trusted_weights, trusted_digest)
    if trust is not None:
        trust.check_model(model)
    info = client.init() if trust is None else trust.checked(client.init())
    return _install(model, client, info, chosen, owns_client=False, skeleton=False, tiling=tiling)


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Takes back what :func:`attach` or :func:`from_pretrained` did to ``model``, and returns it.

    A model of :func:`from_pretrained` never had heavy weights: it can't compute afterwards. Raises
    :class:`~tsqp.errors.ModelError` where ``model`` is not attached.
    """
    attachment = vars(model).get(_ATTRIBUTE)
    if attachment is None:
        raise ModelError(f"this {type(model).__name__} is not attached to a server; nothing to detach")
    attachment.undo()
    return model


def _local_model(path: Any, dtype: Any, placement: Placement, options: dict[str, Any]) -> PreTrainedModel:
    if any(options.pop(name, None) is not None for name in _TRUST_OPTIONS):
        raise ConfigError(f"placement {placement.name!r} asks no server; leave out trusted_weights and trusted_digest")
    if path is None:
        raise ConfigError(f"placement {placement.name!r} needs the path of a local checkpoint")
    building.require_checkpoint(path)
    try:
        with PlainMeta():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True, **options)
    except building.CHECKPOINT_FAULTS as error:
        raise ModelError(f"the checkpoint in {path} can't be loaded: {error}") from error
    vars(model).update(tsqp_client=None, tsqp_placement=placement, close=_nothing_to_close)
    return model


def _nothing_to_close() -> None:
    """The ``close()`` of a model without a server."""


def _install(
    model: PreTrainedModel,
    client: GPUClient,
    info: InitInfo,
    placement: Placement,
    *,
    owns_client: bool,
    skeleton: bool,
    tiling: Tiling,
    tables: Callable[..., dict[str, Tensor]] = kept_embedding.tables,
) -> PreTrainedModel:
    """Makes all changes of a split, or none."""
    if _ATTRIBUTE in vars(model):
        raise ModelError(f"this {type(model).__name__} is attached to a server already; detach it first")
    whole = fused.modules_of(model, info.fused, placement)
    inside = tuple(f"{module.name}." for modules in whole.values() for module in modules)
    targets = dict(_targets(model, info, placement, inside))
    kept = kept_embedding.modules_of(model, info, placement, inside)
    building.refuse_unplaced(model, frozenset((*targets, *kept)), inside)
    dtype = model.dtype
    attachment = Attachment(model, client, placement, owns_client=owns_client, skeleton=skeleton, tiling=tiling)
    try:
        _replace_modules(attachment, info, targets, dtype)
        if whole:
            fused.install(attachment, info.fused, whole)
        if skeleton:
            building.fill_trusted(model, {**info.trusted, **tables(model, client, info.trusted, kept)})
            building.remake_computed(model)
        building.refuse_unusable(model)
        if placement.attention == "server":
            _split_attention(attachment, info)
        instrument(model, attachment)
        _log_forwards(attachment)
        _announce(attachment)
    except BaseException:
        attachment.owns_client = False  # its owner is still waiting for this call
        attachment.undo()
        raise
    return model


def _log_forwards(attachment: Attachment) -> None:
    """Lets the client's performance log, if it has one, know whose forward a round trip belongs to."""
    log = attachment.client.perf_log
    if log is not None:
        began, ended = log.forward_hooks(attachment.placement.name)
        attachment.hook(attachment.model.register_forward_pre_hook(began))
        attachment.hook(attachment.model.register_forward_hook(ended))


def _announce(attachment: Attachment) -> None:
    """Gives the model its public attributes; those of :func:`from_pretrained` outlive the connection."""
    model = attachment.model
    attachment.set_attribute(model, _ATTRIBUTE, attachment)
    public = {
        "tsqp_client": attachment.client,
        "tsqp_placement": attachment.placement,
        "close": attachment.undo,
        "save_pretrained": _refuse_saving,
    }
    if attachment.skeleton:
        vars(model).update(public)
        return
    for name, value in public.items():
        attachment.set_attribute(model, name, value)


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise ModelError("a split model can't be saved: its weights are on the server; save the checkpoint it was made of")


# --- which modules go, and where to -------------------------------------------------------------------------


def _targets(
    model: PreTrainedModel, info: InitInfo, placement: Placement, inside: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    """Full name and kind of every module to replace, each checked against what the server serves.

    Those ``inside`` of a module the server runs whole are checked only.
    """
    head = model.get_output_embeddings()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding):
            kind, sizes = EMBEDDING, (module.num_embeddings, module.embedding_dim, False)
        elif isinstance(module, nn.Linear):
            kind, sizes = (
                LM_HEAD if module is head else LINEAR,
                (module.in_features, module.out_features, module.bias is not None),
            )
        else:
            continue
        if kind not in placement.remote or not _takes_one_tensor(module):
            continue
        served = info.modules.get(name)
        found = None if served is None else (served.in_features, served.out_features, served.bias)
        if served is None or served.kind != (EMBEDDING if kind == EMBEDDING else LINEAR) or found != sizes:
            raise ModelError(
                f"the server does not serve this model: {name} is {_shown(sizes)} here and "
                f"{'missing' if found is None else _shown(found)} there"
            )
        if not name.startswith(inside):
            yield name, kind


def _takes_one_tensor(module: nn.Module) -> bool:
    """False for subclasses whose forward needs more than its input, which the server would not get."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def _shown(sizes: tuple[int, int, bool]) -> str:
    return f"{sizes[0]}x{sizes[1]}{' with bias' if sizes[2] else ''}"


def _replace_modules(attachment: Attachment, info: InitInfo, targets: dict[str, str], dtype: torch.dtype) -> None:
    model, clock = attachment.model, attachment.clock
    originals = {name: model.get_submodule(name) for name in targets}
    calls = _calls(attachment, info, targets, originals)
    for name, module in originals.items():
        stand_in: RemoteModule
        if isinstance(module, nn.Embedding):
            sizes = (module.num_embeddings, module.embedding_dim)
            stand_in = RemoteEmbedding(name, sizes, calls[name], clock, dtype=dtype)
        else:
            assert isinstance(module, nn.Linear)
            stand_in = RemoteLinear(name, (module.in_features, module.out_features), calls[name], clock)
        parent, _, leaf = name.rpartition(".")
        stand_in.train(module.training)
        attachment.replace(model.get_submodule(parent), leaf, stand_in)


def _calls(
    attachment: Attachment, info: InitInfo, targets: dict[str, str], originals: dict[str, nn.Module]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """How each module's result is had from the server."""
    client = attachment.client
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, kind in targets.items():
        if name in calls:
            continue
        if kind == EMBEDDING:
            calls[name] = partial(client.embedding, module=name)
        elif name == info.lm_head:
            calls[name] = client.lm_head
        else:
            family = _siblings(name, targets, originals, attachment.placement)
            group = SiblingGroup(family, _sender(client, family))
            calls.update({member: partial(group.take, member) for member in family})
    return calls


def _siblings(
    name: str, targets: dict[str, str], originals: dict[str, nn.Module], placement: Placement
) -> tuple[str, ...]:
    """The modules that share a round trip with ``name``, itself included, in a fixed order."""
    parent, _, leaf = name.rpartition(".")
    for group in placement.siblings:
        if leaf in group:
            return tuple(
                member
                for member in (f"{parent}.{other}" for other in group)
                if targets.get(member) == LINEAR and originals[member].in_features == originals[name].in_features
            )
    return (name,)


def _sender(client: GPUClient, names: tuple[str, ...]) -> Callable[[Tensor], list[Tensor]]:
    """A function that has all of ``names`` computed for one tensor in one round trip."""
    matches = [_LAYER_NAME.fullmatch(name) for name in names]
    layers = {match and (match[1], match[2]) for match in matches}
    first = matches[0]
    if first is None or len(layers) != 1:
        return lambda x: [client.linear(name, x.detach()) for name in names]
    relative = [match[3] for match in matches if match is not None]
    layer = int(first[2])
    return lambda x: client.batch_linear(layer, relative, x.detach())


# --- attention ----------------------------------------------------------------------------------------------


def _split_attention(attachment: Attachment, info: InitInfo) -> None:
    """Chooses the split attention and gives every attention module its link to the server."""
    model = attachment.model
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        raise ModelError(
            f"{type(model).__name__} does not take its attention from transformers' AttentionInterface, as "
            f"placement {attachment.placement.name!r} needs; use placement 'linear'"
        )
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        inner = any(hasattr(child, "layer_idx") for child in list(module.modules())[1:])
        if isinstance(layer, int) and 0 <= layer < info.geometry.layers and not inner:
            split = SplitAttention(attachment.client, layer, attachment.clock, attachment.tiling)
            attachment.set_attribute(module, MODULE_ATTRIBUTE, split)
            attachment.hook(module.register_forward_pre_hook(split.before_forward, with_kwargs=True))
    attachment.choose_attention(ATTENTION_NAME)
