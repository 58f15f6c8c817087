"""The offline backend: it says back, line by line, what it is told."""

from __future__ import annotations

import secrets
from queue import SimpleQueue

import wire


def run(session: wire.Session) -> int:
    """Answer the prompt, then one message after the other, until the close."""
    # Unbounded: whoever does not read on does not see that the host is gone.
    inbox: SimpleQueue[wire.Message | None] = SimpleQueue()
    session.listen(inbox.put)
    session_id = session.input.session_id or f"echo-{secrets.token_hex(8)}"
    wire.emit(partial=True, new_session_id=session_id)

    message: wire.Message | None = wire.Message(session.input.prompt, id=0)
    while message is not None:
        *firsts, last = _outputs(message.text)
        for text in firsts:
            wire.emit(text, partial=True)
        wire.emit(last, answers=message.id)
        # It waits for the next one, and has read no later one yet.
        wire.emit(new_session_id=session_id, answers=message.id)
        message = inbox.get()
    return 0


def _outputs(text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line.strip()] or [""]
