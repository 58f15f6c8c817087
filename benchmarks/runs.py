"""How long does a run take to its first answer, and what takes the time?

The start is that of the real Claude CLI before a fake API, by the credential proxy, in
each runtime that works here. ``python benchmarks/runs.py`` prints a table. Image and
installed agent are as for any run: see ``clawtrio doctor``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import attrs
import trio
from bots import GROUP, JID, group_directory, in_each_runtime
from report import Report

from clawtrio import Settings, open_engine

STARTS: Final = 5
PARTS: Final = ("container", "interpreter", "SDK", "CLI", "API and frame", "all")

#: Python runs it before anything else: it notes when the container has come up to that,
#: and when the SDK is there and starts the CLI. All clocks count from the boot.
SITE: Final = """
import json, os, sys, time

def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)

with open("/proc/self/stat") as file:
    ticks = int(file.read().rpartition(")")[2].split()[19])
stamps = [ticks / os.sysconf("SC_CLK_TCK"), now()]

def hear(event, arguments):
    if event == "subprocess.Popen" and os.path.basename(arguments[0]) == "claude":
        stamps[2:] = [now()]
        with open("/workspace/group/stamps", "w") as file:
            json.dump(stamps, file)

sys.addaudithook(hear)
"""


def now() -> float:
    """Return the seconds since the boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def events() -> Iterator[bytes]:
    """Yield the events of an answer."""
    usage = {"input_tokens": 1, "output_tokens": 1}
    message: dict[str, object] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [],
        "stop_reason": None,
        "usage": usage,
    }
    block = {"index": 0, "content_block": {"type": "text", "text": ""}}
    text = {"index": 0, "delta": {"type": "text_delta", "text": "Hello."}}
    end = {"delta": {"stop_reason": "end_turn"}, "usage": usage}
    kinds: tuple[tuple[str, dict[str, object]], ...] = (
        ("message_start", {"message": message}),
        ("content_block_start", block),
        ("content_block_delta", text),
        ("content_block_stop", {"index": 0}),
        ("message_delta", end),
        ("message_stop", {}),
    )
    for kind, fields in kinds:
        data = json.dumps({"type": kind, **fields})
        yield f"event: {kind}\ndata: {data}\n\n".encode()


ANSWER: Final = b"".join(events())
HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@attrs.define
class Api:
    """A fake of the API, which answers everything at once.

    Attributes:
        asked: When it was asked, since the boot.
    """

    asked: list[float] = attrs.field(factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        buffer = b""
        while True:
            while b"\r\n\r\n" not in buffer:
                data = await stream.receive_some(2**17)
                if not data:
                    return
                buffer += data
            self.asked.append(now())
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            while len(buffer) < length:
                buffer += await stream.receive_some(2**17)
            buffer = buffer[length:]
            await stream.send_all(
                b"%bContent-Length: %d\r\n\r\n%b" % (HEAD, len(ANSWER), ANSWER)
            )


async def start_once(settings: Settings, api: Api) -> list[float]:
    """Run Claude once; return how many seconds each part took, and all of them."""
    api.asked.clear()
    stamps = trio.Path(settings.groups_dir, GROUP.folder, "stamps")
    async with open_engine(settings) as engine:
        started = now()
        async with engine.open_run(GROUP, "Hello?", chat_jid=JID) as run:
            output = await anext(run)
            answered = now()
            if output.status != "success":
                raise RuntimeError(output.error)
    container, interpreter, sdk = json.loads(await stamps.read_bytes())
    times = [started, container, interpreter, sdk, api.asked[0], answered]
    parts = [b - a for a, b in pairwise(times)]
    return [*parts, answered - started]


async def measure(api: Api, port: int, settings: Settings) -> list[float]:
    """Return the medians of the parts, with the API at that port."""
    equip(settings, port)
    rounds = [await start_once(settings, api) for _ in range(STARTS)]
    return [statistics.median(part) for part in zip(*rounds, strict=True)]


def equip(settings: Settings, port: int) -> None:
    """Tell a bot where the API is, and its agent what to note."""
    Path(settings.root, ".env").write_text(
        f"ANTHROPIC_API_KEY=key\nANTHROPIC_BASE_URL=http://127.0.0.1:{port}\n"
    )
    (group_directory(settings) / "sitecustomize.py").write_text(SITE)


async def main() -> int:
    """Print the table; return the exit code."""
    report = Report("runs")
    api = Api()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    env = {"PYTHONPATH": "/workspace/group", "PYTHONDONTWRITEBYTECODE": "1"}
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, api.serve, [listener])
        look = partial(measure, api, port)
        found = await in_each_runtime(look, agent="claude", agent_env=env)
        nursery.cancel_scope.cancel()
    rows = [
        [runtime, *(f"{seconds:.2f}" for seconds in medians)]
        for runtime, medians in found.items()
    ]
    title = "Seconds from engine.run to the first answer (medians)"
    report.table(title, ("", *PARTS), rows)
    for runtime, medians in found.items():
        report.figure(f"{runtime}: first answer", medians[-1], "s")
    return report.finish()


if __name__ == "__main__":
    sys.exit(trio.run(main))
