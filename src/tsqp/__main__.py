"""The command ``tsqp``, the same as ``python -m tsqp``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command that was typed; ``tsqp run`` before anything is loaded that a runner does without."""
    words = sys.argv[1:]
    debug = words[:1] == ["--debug"]
    if words[debug : debug + 1] == ["run"]:
        from . import run

        run.main([*words[:debug], *words[debug + 1 :]])
    from .cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
