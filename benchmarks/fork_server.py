"""Imported by the process that servers and clients are forked from, and by no other: it ends with the benchmark, even
one that was killed, and what was forked from it ends with it."""

from . import machine

machine.die_with_parent()
