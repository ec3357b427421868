"""The embedded model: a LLaMA of 1.2 M parameters that speaks, so that tsqp can be tried without a download.

Trained by ``tools/train_demo.py`` on the King James Bible; see README.md in this folder.
"""

from __future__ import annotations

import importlib.resources

#: What ``tsqp demo`` and the examples continue when nothing else is asked for.
PROMPT = "Then came the people"


def model_path() -> str:
    """The checkpoint's directory (config, weights, tokenizer), as ``from_pretrained`` takes it."""
    return str(importlib.resources.files(__name__))
