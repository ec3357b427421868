"""The split models that tsqp replaces, written anew from their description, to be measured beside it.

Both run transformers' own modelling code over the same skeleton as tsqp, with the attention matmuls on the server: 6
round trips a layer and 2 more. Every call sends its tensors whole (K and V of all earlier tokens too, though once per
kv head and not once per head), waits for its reply and only then goes on.

``msgpack``  every tensor packed with msgpack (``tobytes``, shape, dtype), over ZeroMQ REQ/REP
``flags``    a ring in shared memory, 10 slots of 10 MB, whose flags are written from Python; a ZeroMQ message says
             which slot and what is in it; tensors over 10 MB go over ZeroMQ
"""

from .client import connect
from .server import serving
from .wires import TITLES, addresses

__all__ = ["TITLES", "addresses", "connect", "serving"]
