"""Text as it comes: what ``tsqp generate`` and ``tsqp run`` give to transformers as a streamer."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from transformers import TextStreamer


class PromptStreamer(TextStreamer):
    """Writes ``prompt``, then the generated text word by word, then ``end``, to ``out`` (the standard output)."""

    def __init__(self, tokenizer: Any, prompt: str = "", out: TextIO | None = None, end: str = "\n") -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._prompt, self._out, self._end = prompt, out, end

    def put(self, value: Any) -> None:
        """Tokens; the first call has those of the prompt, whose text is known better than they tell."""
        if self.next_tokens_are_prompt:
            self._write(self._prompt)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text that later tokens don't change any more."""
        self._write(text + (self._end if stream_end else ""))

    def _write(self, text: str) -> None:
        print(text, end="", file=self._out or sys.stdout, flush=True)
