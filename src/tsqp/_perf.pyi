from collections.abc import Callable
from typing import Any

from typing_extensions import Self, disjoint_base

from ._message import Message

RING: int
ZMQ: int
TILES: int
COLUMN_COUNT: int

@disjoint_base
class RoundTrips:
    enabled: bool
    def __new__(
        cls,
        capacity: int,
        window: int,
        prefixes: list[str],
        widths: list[int],
        none: str,
        end: str,
        quote: str,
        ms_decimals: int,
        describe: Callable[[Any], tuple[str, int | None]],
    ) -> Self: ...
    @property
    def dropped(self) -> int: ...
    def note_sent(self, request_id: int, begin_ns: int, waited_ns: int, nbytes: int, carrier: int) -> None: ...
    def note(self, site: Any, reply: Message) -> None: ...
    def add_placement(self, name: str) -> int: ...
    def forward_began(self, placement: int) -> None: ...
    def forward_ended(self) -> None: ...
    def __len__(self) -> int: ...
    def drain(self) -> bytes: ...
    @property
    def totals(self) -> dict[str, int]: ...
