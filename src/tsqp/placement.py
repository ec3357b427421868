"""Placements: which operator of a decoder runs on the server and which in the runner.

A placement is data. :mod:`tsqp.split` reads it and replaces modules accordingly, so a new one is a new entry
of :data:`PLACEMENTS` (or a :class:`Placement` passed in its place), as long as it uses the kinds named here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import ConfigError

#: Kinds of modules that can live on the server.
EMBEDDING, LINEAR, LM_HEAD = "embedding", "linear", "lm_head"
#: Kinds of modules that the server can run whole, with everything inside them.
FUSED_ATTENTION, FUSED_MLP, FUSED_LAYER = "fused_attention", "fused_mlp", "fused_layer"

#: Linears of one parent module that are fed the same tensor, by the names decoder families give them.
#: The members that exist, and have the same input width, share one round trip.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Placement:
    """Where the operators of a decoder run.

    ``remote`` holds the kinds of modules that are on the server. ``attention`` is ``"runner"`` (transformers'
    own attention in the runner), ``"server"`` (Q·Kᵀ and A·V on the server, softmax in the runner) or ``"fused"``
    (all of it on the server, which keeps K and V). A forward of L layers takes
    ``trips_per_layer * L + trips_per_forward`` round trips in a decoder with separate q, k, v and gate, up
    projections; one round trip is a request message and its reply, whatever the number of tensors.
    """

    name: str
    summary: str
    remote: frozenset[str]
    attention: str
    trips_per_layer: int
    trips_per_forward: int
    siblings: tuple[tuple[str, ...], ...] = SIBLINGS

    @property
    def needs_server(self) -> bool:
        """False where everything runs in the runner."""
        return bool(self.remote)

    @property
    def keeps_embedding(self) -> bool:
        """True where the runner looks tokens up itself, so that their ids are never sent."""
        return EMBEDDING not in self.remote

    def keeping_embedding(self) -> Placement:
        """This placement with Embedding in the runner: one round trip less per forward, and no token id is sent."""
        if self.keeps_embedding:
            return self
        return replace(
            self,
            summary=f"{self.summary.removeprefix('Embedding, ')}; Embedding in the runner",
            remote=self.remote - {EMBEDDING},
            trips_per_forward=self.trips_per_forward - 1,
        )

    def __str__(self) -> str:
        return f"{self.name}, embedding kept" if self.keeps_embedding and self.needs_server else self.name

    def round_trips(self, layers: int) -> int:
        """Round trips of one forward through ``layers`` decoder layers, embedding and LM head included."""
        return self.trips_per_layer * layers + self.trips_per_forward


_HEAVY = frozenset({EMBEDDING, LINEAR, LM_HEAD})

PLACEMENTS: dict[str, Placement] = {
    placement.name: placement
    for placement in (
        Placement("local", "everything in the runner", frozenset(), "runner", 0, 0),
        # Per layer: q/k/v, o, gate/up, down. Per forward: embedding and LM head.
        Placement("linear", "Embedding, Linear and LM head on the server", _HEAVY, "runner", 4, 2),
        # As linear, and per layer Q·Kᵀ and A·V.
        Placement(
            "ops",
            "Embedding, Linear, LM head and the attention matmuls on the server",
            _HEAVY,
            "server",
            6,
            2,
        ),
        Placement(
            "fused",
            "whole attention and MLP of each layer on the server; norms and residuals in the runner",
            _HEAVY | {FUSED_ATTENTION, FUSED_MLP},
            "fused",
            2,
            2,
        ),
        Placement(
            "layer",
            "whole layers on the server; final norm and sampling in the runner",
            _HEAVY | {FUSED_LAYER},
            "fused",
            1,
            2,
        ),
    )
}


def get_placement(placement: str | Placement, keep_embedding: bool = False) -> Placement:
    """Looks a placement up by name; a :class:`Placement` stands for itself.

    With ``keep_embedding`` it is the one that keeps Embedding in the runner. Raises
    :class:`~tsqp.errors.ConfigError` naming the choices where there is none of that name.
    """
    if not isinstance(placement, Placement):
        try:
            placement = PLACEMENTS[placement]
        except (KeyError, TypeError):
            choices = ", ".join(PLACEMENTS)
            raise ConfigError(f"there is no placement {placement!r}; choose one of {choices}") from None
    return placement.keeping_embedding() if keep_embedding else placement
