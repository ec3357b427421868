"""Imported by the process that servers and clients are forked from, and by no other: it ends with the benchmark, even
one that was killed, and what was forked from it ends with it. Ctrl-C is the benchmark's business, not theirs."""

import signal

from . import machine

machine.die_with_parent()
signal.signal(signal.SIGINT, signal.SIG_IGN)
