"""Who owes whom an answer: what Claude does in, frames out. Nothing runs here.

The backend ``claude`` translates the messages of the SDK into the events below, so that
this needs neither the SDK nor a clock.

- Each message goes to Claude under a UUID of ours, and each result names the UUIDs that
  it took in: a follow-up into the running turn may be answered with it, or after it.
- What goes wrong is an error, and never text for the chat.
- While Claude owes an answer it is alive, though it may not say anything for long; but
  not for ever: a tool may hang.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias, TypedDict

if TYPE_CHECKING:
    from wire import Message

LONGEST_SILENCE: Final = 1800.0
"""Seconds after which whatever works without a word is taken for hung."""


class Frame(TypedDict, total=False):
    """The arguments of :func:`wire.emit`."""

    result: str | None
    status: str
    new_session_id: str
    error: str
    partial: bool
    answers: int


@dataclass(frozen=True, slots=True)
class Began:
    """Claude begins a turn, in this session."""

    session_id: str


@dataclass(frozen=True, slots=True)
class Grew:
    """There is more text of an answer that goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolBegan:
    """A tool works."""

    id: str


@dataclass(frozen=True, slots=True)
class ToolEnded:
    """A tool is done."""

    id: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A turn is over: its text, or what went wrong, and the messages it took in.

    Attributes:
        text: The answer; None if there is none.
        error: What went wrong; None if nothing did.
        uuids: Of the messages.
        ours: Whether one of our messages began it, not something that Claude had left
            to work in the background.
    """

    text: str | None
    error: str | None = None
    uuids: tuple[str, ...] = ()
    ours: bool = True


Event: TypeAlias = Began | Grew | ToolBegan | ToolEnded | Ended


@dataclass
class Dialogue:
    """One start of the agent.

    Attributes:
        session_id: The session that Claude is in; None before it says so.
        note: What the caller should know of the next answer.
    """

    session_id: str | None = None
    note: str | None = None
    _unanswered: dict[str, Message] = field(default_factory=dict)
    _answered: int | None = None
    _tools: dict[str, float] = field(default_factory=dict)
    _heard_at: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether nothing is unanswered."""
        return not self._unanswered

    @property
    def unanswered(self) -> list[tuple[str, str]]:
        """The UUIDs and texts that Claude owes an answer to."""
        return [(key, message.text) for key, message in self._unanswered.items()]

    def put(self, message: Message, now: float) -> str:
        """Take down that *message* is sent at *now*, and return the UUID for it."""
        key = str(uuid.uuid4())
        self._unanswered[key] = message
        self._heard_at = now
        return key

    def hear(self, event: Event | None, now: float) -> list[Frame]:
        """Take in what Claude does at *now*, None for anything else it says."""
        self._heard_at = now
        match event:
            case Began(session_id) if session_id != self.session_id:
                self.session_id = session_id
                return [{"partial": True, "new_session_id": session_id}]
            case Grew(text):
                return [{"partial": True, "result": text}]
            case ToolBegan(tool):
                self._tools[tool] = now
            case ToolEnded(tool):
                self._tools.pop(tool, None)
            case Ended():
                self._tools.clear()
                return list(self._close(event))
        return []

    def fail(self, error: str) -> Frame:
        """Give up: return the frame that says so."""
        self._take(list(self._unanswered))
        return {"status": "error", "error": error, **self._context()}

    def is_alive(self, now: float) -> bool:
        """Tell whether Claude is at work at *now*, as far as can be known."""
        since = min([self._heard_at, *self._tools.values()])
        return not self.idle and now - since < LONGEST_SILENCE

    def _close(self, ended: Ended) -> Iterator[Frame]:
        taken = [key for key in ended.uuids if key in self._unanswered]
        if ended.ours and not taken:
            # An old result, or one that names nothing: they come in order.
            taken = list(self._unanswered)[:1]
        self._take(taken)
        frame: Frame = self._context()
        if ended.error is not None:
            yield {"status": "error", "error": ended.error, **frame}
        elif taken or ended.text:
            if self.note is not None:
                frame["error"] = self.note
                self.note = None
            yield {"result": ended.text or "", **frame}
        if self.idle:
            yield self._context()

    def _take(self, keys: list[str]) -> None:
        """Take down that the messages under *keys*, and all before, are answered."""
        while not set(keys).isdisjoint(self._unanswered):
            message = self._unanswered.pop(next(iter(self._unanswered)))
            self._answered = message.id

    def _context(self) -> Frame:
        frame: Frame = {}
        if self.session_id is not None:
            frame["new_session_id"] = self.session_id
        if self._answered is not None:
            frame["answers"] = self._answered
        return frame
