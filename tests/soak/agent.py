"""An agent that does what its prompt says: ``{"note": name, "steps": [...]}``.

It numbers its outputs, from 1, in ``newSessionId``, and keeps count of them in the
note, a file in its group's folder: how many it has begun to write, and how many it has
written. Whoever reads that knows what must arrive, however the agent has ended.

In a container this file is all that there is of it; clawtrio is not there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What is done, and with what.
Step = list[Any]

START = b"---NANOCLAW_OUTPUT_START---\n"
END = b"\n---NANOCLAW_OUTPUT_END---\n"
#: Steps that write an output which is delivered.
NUMBERED = frozenset({"say", "part", "fail", "ready"})


def frame(fields: dict[str, Any]) -> bytes:
    """Put an output between markers."""
    return START + json.dumps(fields).encode() + END


def bytes_of(step: Step, number: int, heard: int) -> tuple[int, bytes]:
    """Return what a step writes, and to which descriptor.

    Args:
        step: What to do.
        number: The output's, if it is one.
        heard: The number of the last message read: this, and those before, it answers.
    """
    kind, *more = step
    fields = {"status": "success", "newSessionId": str(number), "answers": heard}
    written: dict[str, Callable[[], bytes]] = {
        "say": lambda: frame({**fields, "result": "x" * more[0]}),
        "part": lambda: frame({**fields, "result": "so far", "partial": True}),
        "fail": lambda: frame({**fields, "status": "error", "error": "no"}),
        "ready": lambda: frame({**fields, "result": None}),
        "heartbeat": lambda: frame(
            {"status": "success", "result": None, "partial": True}
        ),
        "garbage": lambda: START + b'{"status": "maybe"}' + END,
        "oversize": lambda: frame({**fields, "result": "x" * more[0]}),
        "noise": lambda: (b"-" * 99 + b"\n") * (more[0] // 100),
        "complain": lambda: (b"?" * 99 + b"\n") * (more[0] // 100),
        "tear": lambda: START + b'{"status": "succ',
    }
    return 2 if kind == "complain" else 1, written[kind]()


class Note:
    """The count of outputs, for the host to read."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.begun = 0

    def begin(self) -> None:
        """Count an output that is about to be written."""
        self.begun += 1
        os.pwrite(self._fd, b"%9d " % self.begun, 0)

    def end(self) -> None:
        """Count it as written."""
        os.pwrite(self._fd, b"%9d\n" % self.begun, 10)

    def close(self) -> None:
        """Write no more."""
        os.close(self._fd)


def write(fd: int, data: bytes) -> None:
    """Write all of it, past any buffer that would be lost when we are killed."""
    while data:
        data = data[os.write(fd, data) :]


class Agent:
    """The agent as a process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._note = Note(Path("/workspace/group", plan["note"]))
        self._heard = 0

    def speak(self, step: Step) -> None:
        """Write what the step says."""
        numbered = step[0] in NUMBERED
        if numbered:
            self._note.begin()
        write(*bytes_of(step, self._note.begun, self._heard))
        if numbered:
            self._note.end()

    def act(self, step: Step) -> None:
        """Do a step."""
        kind, *more = step
        if kind in ACTS:
            ACTS[kind](*more)
        elif kind == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif kind == "fork":
            # It holds our stdout and stderr, but not our stdin.
            subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
        elif kind == "listen":
            self.listen()
        elif kind == "stay":
            while True:
                time.sleep(60)
        elif kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            self.speak(step)

    def listen(self) -> None:
        """Answer what was asked, then each message, until told to leave."""
        self.speak(["say", 10])
        while line := sys.stdin.readline():
            message = json.loads(line)
            if message["type"] == "close":
                break
            self._heard = message["id"]
            self.speak(["say", 10])


def ask(size: int) -> None:
    """Have the API say what it is told."""
    body = os.urandom(size)
    url, key = (os.environ[f"ANTHROPIC_{name}"] for name in ("BASE_URL", "API_KEY"))
    request = urllib.request.Request(f"{url}/v1/messages", body, {"x-api-key": key})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.read() == body


def fail_once(mark: str) -> None:
    """Leave with an error, unless that was done before."""
    try:
        Path("/workspace/group", mark).touch(exist_ok=False)
    except FileExistsError:
        return
    os._exit(1)


#: Steps that are no more than this.
ACTS: dict[str, Callable[..., None]] = {
    "sleep": time.sleep,
    "ask": ask,
    "flaky": fail_once,
    "exit": os._exit,
}


def main() -> None:
    """Do what the prompt says."""
    plan = json.loads(json.loads(sys.stdin.readline())["prompt"])
    agent = Agent(plan)
    for step in plan["steps"]:
        agent.act(step)


if __name__ == "__main__":
    main()
