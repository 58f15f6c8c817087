"""The texts of the Telegram bot: what people say, for agents, and the way back."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, TypeAlias
from zoneinfo import ZoneInfo

Line: TypeAlias = tuple[str, str, str]
"""Who said something, when, in words of the groups' time zone, and what."""

#: Telegram's limit for a message, in UTF-16 code units.
MAX_UNITS: Final = 4096
#: Characters of one answer that reach a chat: more would be a flood of messages.
MAX_ANSWER: Final = 2**16
_INTERNAL: Final = re.compile(r"<internal>.*?(</internal>|\Z)", re.DOTALL)
#: What a message may have in place of text; agents are told as NanoClaw does it.
_KINDS: Final = {
    "photo": "[Photo]",
    "video": "[Video]",
    "voice": "[Voice message]",
    "audio": "[Audio]",
    "document": "[Document]",
    "sticker": "[Sticker]",
    "location": "[Location]",
    "contact": "[Contact]",
}


def messages_of(text: str) -> list[str]:
    """Return the messages that an agent's text makes, without what is not for people.

    Telegram takes each of them; they end with lines if possible, else with words.
    """
    text = _INTERNAL.sub("", text).strip()
    if len(text) > MAX_ANSWER:
        text = f"{text[:MAX_ANSWER]}\n[…]"
    pieces = []
    while text:
        units = text[:MAX_UNITS].encode("utf-16-le")[: 2 * MAX_UNITS]
        head = units.decode("utf-16-le", "ignore")  # without half a surrogate pair
        cut = len(head)
        if head != text:
            ends = (head.rfind("\n") + 1, head.rfind(" ") + 1)
            cut = next((end for end in ends if end > cut // 2), cut)
        pieces.append(text[:cut])
        text = text[cut:]
    # Telegram refuses what is empty to the eye.
    return [piece for piece in pieces if piece.strip()]


def command_of(text: str, name: str) -> str:
    """Return the command in a text, if it is for the bot *name*, else nothing."""
    found = re.match(r"/(\w+)(?:@(\w+))?", text)
    if found and (found[2] or name).casefold() == name.casefold():
        return found[1]
    return ""


def is_call(text: str, trigger: str) -> bool:
    """Whether a text calls the agent, by its first word."""
    return bool(re.match(rf"{re.escape(trigger)}(?!\w)", text, re.IGNORECASE))


def with_trigger(text: str, trigger: str, name: str) -> str:
    """Have a text that mentions the bot *name* call the agent."""
    mention = rf"(?<!\w)@{re.escape(name)}(?!\w)"
    if re.search(mention, text, re.IGNORECASE) and not is_call(text, trigger):
        return f"{trigger} {text}"
    return text


def words_of(message: Mapping[str, Any]) -> str:
    """Return what a message says, with a placeholder for what is not text."""
    kind = next((words for name, words in _KINDS.items() if name in message), "")
    text = message.get("text") or message.get("caption") or ""
    return f"{kind} {text}".strip()


def line_of(message: Mapping[str, Any], text: str, timezone: str) -> Line:
    """Return who says *text* with a message, and when: "Nov 5, 2026, 9:07 AM"."""
    sender = message.get("from", {})
    name = sender.get("first_name") or sender.get("username") or "Unknown"
    at = datetime.fromtimestamp(message["date"], ZoneInfo(timezone))
    time = f"{at:%b} {at.day}, {at.year}, {at.hour % 12 or 12}:{at:%M %p}"
    return name, time, text


def prompt_of(lines: Iterable[Line], timezone: str) -> str:
    """Write messages as NanoClaw's agents know them."""
    messages = [
        f'<message sender="{_escaped(sender)}" time="{time}">{_escaped(text)}</message>'
        for sender, time, text in lines
    ]
    header = f'<context timezone="{_escaped(timezone)}" />'
    return "\n".join([header, "<messages>", *messages, "</messages>"])


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace('"', "&quot;")
