"""The numbers by which libzmq knows peers that choose no identity: nobody may foresee them.

A peer that chooses the number of one to come makes libzmq abort the process when its turn is there.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from carriers import CARRIERS
from ends import client_of

import tsqp

ROOT = Path(__file__).parent.parent
LIMIT_S = 60.0
#: A server and, in its process, who attacks it: an abort ends both. FIRST is where rand() begins if nobody seeds it.
ATTACK = """
import socket, sys, time
import tsqp
from benchmarks import zmtp

FIRST = 0x6B8B4567
with tsqp.listen(sys.argv[1], max_chunk_bytes=65536, max_chunks=4) as listener:
    attackers = []
    for number in range(FIRST, FIRST + 40):
        attackers.append(socket.socket(socket.AF_UNIX))
        attackers[-1].connect(sys.argv[1].removeprefix("ipc://"))
        attackers[-1].sendall(zmtp.opening(identity=b"\\0" + number.to_bytes(4, "big")))
        zmtp.hear(attackers[-1], zmtp.READY)
    for _ in range(60):
        with tsqp.connect(listener.endpoint, 30.0):
            pass
print("survived")
"""


def numbers(endpoint: str) -> list[int]:
    """Those that libzmq gives the first peers of a listener."""
    with tsqp.listen(endpoint, **CARRIERS["ring"].listen_options) as made, client_of(made, CARRIERS["ring"]):
        identities = list(made._hub.clients)
    assert [len(identity) for identity in identities] == [5]
    return [int.from_bytes(identity[1:], "big") for identity in identities]


def test_they_start_anew_with_each_listener(endpoint):
    found = {number for _ in range(4) for number in numbers(endpoint)}
    assert len(found) == 4
    assert min(abs(one - other) for one in found for other in found if one != other) > 1000


def test_a_peer_that_chooses_the_next_number_does_not_end_the_server(endpoint):
    command = [sys.executable, "-c", ATTACK, endpoint]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (run.returncode, run.stdout) == (0, "survived\n"), run.stderr
