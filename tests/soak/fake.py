"""The agent as a task of the engine's process.

It has no signals, no children, and no way to the API.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import trio

from clawtrio.testing import AgentPipes
from tests.helpers import Reader

from .agent import NUMBERED, Note, Step, bytes_of


async def agent(pipes: AgentPipes) -> int:
    """Do what the prompt says."""
    reader = Reader(pipes.stdin)
    first = await reader.line()
    if first is None:
        return 0
    plan = json.loads(first["prompt"])
    group = next(
        Path(held.mount.host_path)
        for held in pipes.spec.mounts
        if held.mount.container_path == "/workspace/group"
    )
    note = Note(group / plan["note"])
    fake = _Fake(pipes, reader, note, group)
    try:
        for step in plan["steps"]:
            code = await fake.act(step)
            if code is not None:
                return code
    finally:
        note.close()
    return 0


@attrs.define
class _Fake:
    pipes: AgentPipes
    reader: Reader
    note: Note
    group: Path
    heard: int = 0

    async def speak(self, step: Step) -> None:
        numbered = step[0] in NUMBERED
        if numbered:
            self.note.begin()
        fd, data = bytes_of(step, self.note.begun, self.heard)
        await (self.pipes.stdout if fd == 1 else self.pipes.stderr).send_all(data)
        if numbered:
            self.note.end()

    async def act(self, step: Step) -> int | None:
        """Do a step; return the exit code, if it is the last one."""
        kind, *more = step
        if kind == "sleep":
            await trio.sleep(more[0])
        elif kind == "stay":
            await trio.sleep_forever()
        elif kind == "die":
            return 137
        elif kind == "exit":
            return int(more[0])
        elif kind == "listen":
            await self.listen()
        elif kind == "flaky":
            return self.fail_once(more[0])
        elif kind not in {"ask", "deaf", "fork"}:
            await self.speak(step)
        return None

    async def listen(self) -> None:
        await self.speak(["say", 10])
        while (line := await self.reader.line()) and line["type"] != "close":
            self.heard = line["id"]
            await self.speak(["say", 10])

    def fail_once(self, mark: str) -> int | None:
        path = self.group / mark
        if path.exists():
            return None
        path.touch()
        return 1
