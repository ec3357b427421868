"""A peer that rewrites the shared segment at random while the victim works on it: errors, never more.

1.2 million mutations; ``TSQP_SOAK=1`` makes it 24 million.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_peers as hp
import pytest
from peers import Peer
from wire_bytes import check_numbered, numbered

import tsqp

#: In each round and role of the victim.
MUTATIONS = 200_000
ROUNDS = 60 if os.environ.get("TSQP_SOAK") == "1" else 3
#: A last resort: what ends a round that hangs is that the bad peer says nothing any more.
LIFE_S = 900.0
#: What a victim's memory may grow by: the pool that keeps freed result memory, twice.
MAX_GROWTH_BYTES = 512 << 20

StartPeer = Callable[..., Peer]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hp.build_library(tmp_path_factory.mktemp("hostile"))


def _check(report: dict[str, Any], assault: dict[str, int]) -> None:
    """The victim was assaulted in every way, worked on, and never saw anything but errors of tsqp."""
    print(f"\nassault: {assault}\nvictim: {report}")
    assert report["wrongs"] == []
    assert report["hanging"] == 0
    assert assault["mutations"] >= MUTATIONS
    kinds = [assault[kind] for kind in ("flags", "header_words", "message_words", "payload_words")]
    assert min(kinds) > MUTATIONS // 200
    assert report["grown"] < MAX_GROWTH_BYTES
    # Not a peer nobody listened to: both good and bad messages came through.
    outcomes = report["outcomes"]
    refused = sum(count for name, count in outcomes.items() if name.endswith("Error") and "Timeout" not in name)
    assert outcomes["messages"] > 0
    assert refused > 300


@pytest.mark.watchdog(LIFE_S)
@pytest.mark.parametrize("seed", range(1, ROUNDS + 1))
def test_a_server_stands_a_hostile_client_and_serves_the_others(
    start_peer: StartPeer, endpoint: str, library: Path, seed: int
) -> None:
    victim = start_peer(hp.victim_server, endpoint, life_s=LIFE_S)
    assert victim.hear() == "listening"
    with tsqp.connect(endpoint) as innocent:
        bad = start_peer(hp.bad_client, str(library), endpoint, 1000 * seed, MUTATIONS, life_s=LIFE_S)
        assault, number = hp.Assault(bad), 0
        while (done := assault.poll()) is None:
            nbytes = number * 97 % 3000
            innocent.send([numbered(number, nbytes)], request_id=number, timeout=30)
            check_numbered(innocent.recv(30), number, nbytes)
            number += 1
        assert number > 300
    victim.say("stop")
    _check(victim.hear(), done)
    assert victim.join() == 0


@pytest.mark.watchdog(LIFE_S)
@pytest.mark.parametrize("seed", range(1, ROUNDS + 1))
def test_a_client_stands_a_hostile_server(start_peer: StartPeer, endpoint: str, library: Path, seed: int) -> None:
    bad = start_peer(hp.bad_server, str(library), endpoint, 1000 * seed, MUTATIONS, life_s=LIFE_S)
    assert bad.hear() == "listening"
    victim = start_peer(hp.victim_client, endpoint, life_s=LIFE_S)
    assault = hp.Assault(bad)
    while (done := assault.poll(1.0)) is None:
        pass
    victim.say("stop")
    _check(victim.hear(), done)
    assert victim.join() == 0
