"""File descriptors: where libzmq gets none it may abort the process, so tsqp makes sure of some before it asks."""

from __future__ import annotations

import contextlib
import errno
import os
import resource

from .errors import DescriptorsExhaustedError

#: What is opened at once, and some to spare: by a listener, by a client that connects, by pyzmq's own thread that
#: looks after borrowed memory.
LISTENING, CONNECTING, BORROWING = 32, 16, 12
#: What a client that is let in needs at most, and as much again.
_FREE = 8
#: Kept back for clients that have to be refused.
_HELD = 8
_PLENTY = 1 << 16
#: An entry for each descriptor of this process.
_OPENED = "/proc/self/fd"
#: What the system says where no more descriptors can be opened.
EXHAUSTED = (errno.EMFILE, errno.ENFILE)


def _take(source: int, count: int) -> list[int]:
    """`count` duplicates of a descriptor, or none at all where there are too few left."""
    taken: list[int] = []
    try:
        for _ in range(count):
            taken.append(os.dup(source))
    except OSError as error:
        give_back(taken)
        if error.errno not in EXHAUSTED:
            raise
    return taken


def give_back(taken: list[int]) -> None:
    """Closes them all."""
    while taken:
        os.close(taken.pop())


def raise_limit() -> None:
    """Lets this process open as many files as its hard limit allows: the usual soft limit of 1024 is one that a burst
    of connections reaches before anybody can end them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _PLENTY if hard == resource.RLIM_INFINITY else min(hard, _PLENTY)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # then it stays as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def require(count: int, purpose: str) -> None:
    """Raises DescriptorsExhaustedError where fewer than `count` more descriptors can be opened now."""
    with contextlib.ExitStack() as stack:
        try:
            ends = os.pipe()
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
        else:
            stack.callback(give_back, list(ends))
            taken = _take(ends[0], count - len(ends))
            if taken:
                give_back(taken)
                return
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise DescriptorsExhaustedError(
        errno.EMFILE,
        f"can't {purpose}: it takes {count} file descriptors and fewer are left of this process's {limit}; "
        "raise the limit (ulimit -n) or close files",
    )


class Reserve:
    """Descriptors that a listener keeps back.

    On a Unix socket libzmq aborts the process when a client comes and there is no descriptor for it. So while few are
    left the reserve is given up: the client is let in as far as the handshake and refused there.
    """

    def __init__(self, source: int) -> None:
        self._source = source
        self._held = _take(source, _HELD)

    @property
    def scarce(self) -> bool:
        """True while new clients have to be refused."""
        return not self._held

    def look(self) -> None:
        """Gives the reserve up, or takes it back, as descriptors come and go. Cheap; called often."""
        if self._left() < (_FREE if self._held else _FREE + _HELD):
            give_back(self._held)
        elif not self._held:
            self._held = _take(self._source, _HELD)

    def _left(self) -> int:
        """How many more can be opened, at most `_FREE` and `_HELD`. They are counted: to try would take the last ones
        for a moment, in which a client may come."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError):
            # Since Linux 6.2 the directory's size is the number of its entries; before, it is 0.
            opened = os.stat(_OPENED).st_size or len(os.listdir(_OPENED)) - 1
            if limit == resource.RLIM_INFINITY or limit - opened > _FREE + _HELD:
                return _FREE + _HELD
            return limit - opened
        wanted = _FREE if self._held else _FREE + _HELD  # no /proc here
        taken = _take(self._source, wanted)
        count = len(taken)
        give_back(taken)
        return count

    def close(self) -> None:
        give_back(self._held)
