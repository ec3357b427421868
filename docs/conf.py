"""The documentation site: ``make docs`` builds it into build/docs with warnings as errors.

Nothing is fetched while it is built or read: no fonts, no scripts, no inventories of other projects.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tsqp

project = "tsqp"
author = "the tsqp authors"
copyright = "the tsqp authors, Apache-2.0"
release = version = tsqp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "tsqp_docs"]
exclude_patterns = ["_extensions"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90

nitpicky = True
# The types of others, and private ones that only signatures name; tsqp's own have to resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|nn|os|collections|typing|types|transformers|concurrent|contextlib)(\..*)?"),
    (r"py:.*", r"(Tensor|dtype|Any|Sequence|Mapping|Callable|PreTrainedModel|T|TracebackType|Generator|optional)"),
    (r"py:.*", r"(str|int|float|bool|bytes|tuple|list|dict|object|memoryview|None|BaseException|CancelledError)"),
    (r"py:.*", r"tsqp\.(calls\.Protection|pending\.T|errors\._SystemError)"),
]

html_theme = "furo"
html_title = f"tsqp {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
