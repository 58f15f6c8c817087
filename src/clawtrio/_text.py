"""Text that an agent chose, made fit for a terminal or a log line."""

from __future__ import annotations

import re
from typing import Final

# C0 and C1 controls, DEL, and what reorders or hides text: bidi marks, embeddings,
# overrides and isolates, zero-width characters, line and paragraph separators.
_UNFIT: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNFIT_IN_LINE: Final = re.compile(f"[\\n\\t]|{_UNFIT.pattern}")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    """Escape control characters, but newline and tab, and what reorders text."""
    return _UNFIT.sub(_escape, text)


def one_line(text: str) -> str:
    """Escape as :func:`printable` does, newline and tab too: one record, one line."""
    return _UNFIT_IN_LINE.sub(_escape, text)
