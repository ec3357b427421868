"""``tsqp trust``: writes the file that a runner trusts instead of the server's word, and prints its digest."""

from __future__ import annotations

import sys
from pathlib import Path

from . import cli_options as options
from .cli_parts import checkpoint, quiet_progress_bars, status

EXAMPLE = "Example: [bold]tsqp trust --model ~/Llama-3.2-1B --out trusted.safetensors[/]"


def trust(*, out: options.TrustOut, model: options.Model = None, embedding: options.WithEmbedding = False) -> None:
    """Writes what a runner has to trust of a checkpoint to a file, and prints that file's digest.

    Run it where both the checkpoint and the machine are trusted, and take the digest to the runner by a way that
    the server can't reach. Only what a runner computes with is written and read: no weights of linear layers.
    """
    path = checkpoint(model)
    with status("loading torch and transformers") as tell:
        from .trusted_making import write_trusted_weights

        quiet_progress_bars()
        tell(f"reading {path}")
        digest = write_trusted_weights(path, out, embedding)
    print(f"wrote {out}, {Path(out).stat().st_size} bytes; its digest is for --trusted-digest:", file=sys.stderr)
    print(digest)
