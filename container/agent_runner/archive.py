"""A transcript as Markdown, kept before Claude shortens what it remembers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

#: Characters of one message that are kept.
_LONGEST: Final = 2000
_NAME_LENGTH: Final = 50


def archive(
    transcript: Path, directory: Path, *, session_id: str, assistant: str, now: datetime
) -> Path | None:
    """Write *transcript* into *directory*; None if nothing was said in it.

    Args:
        transcript: Claude's file: a line of JSON for each message.
        directory: Made if it is missing.
        session_id: For the summary that Claude may have beside the transcript.
        assistant: What the assistant is called.
        now: The local time.

    Raises:
        OSError: If one cannot be read, or the other not be written.
    """
    with transcript.open(encoding="utf-8", errors="replace") as lines:
        said = list(_messages(lines))
    if not said:
        return None
    summary = _summary(transcript.with_name("sessions-index.json"), session_id)
    name = re.sub(r"[^a-z0-9]+", "-", (summary or "").lower()).strip("-")
    name = name[:_NAME_LENGTH] or f"conversation-{now:%H%M}"
    path = directory / f"{now:%Y-%m-%d}-{name}.md"
    parts = [f"# {summary or 'Conversation'}", f"Archived: {now:%b %d, %Y, %H:%M}"]
    parts += ["---", *(_paragraph(who, text, assistant) for who, text in said)]
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="replace")
    return path


def _messages(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield who said what; what is no message is left out."""
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.get("type") in {"user", "assistant"}:
            message = entry.get("message")
            text = _text(message.get("content")) if isinstance(message, dict) else ""
            if text:
                yield entry["type"], text


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    texts = [block.get("text") for block in blocks if isinstance(block, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _paragraph(who: str, text: str, assistant: str) -> str:
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return f"**{assistant if who == 'assistant' else 'User'}**: {short}"


def _summary(index: Path, session_id: str) -> str | None:
    try:
        value = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    entries = value.get("entries") if isinstance(value, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and entry.get("sessionId") == session_id:
            summary = entry.get("summary")
            return summary if isinstance(summary, str) and summary else None
    return None
