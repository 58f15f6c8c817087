"""How long does a run take to its first answer, and a follow-up to its agent?

The start is that of the real Claude CLI before a fake API, by the credential proxy, in
each runtime that works here, and split by who takes the time; the follow-ups are those
of the agent runner's own reader. ``python benchmarks/runs.py`` prints two tables. Root,
image and installed agent are as for any run: see ``clawtrio doctor``.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final

import attrs
import trio
import trio.lowlevel
from rich.console import Console
from rich.table import Table

from clawtrio import Group, RuntimeUnavailableError, Settings, open_engine
from clawtrio._cli_care import RuntimeName

RUNTIMES: Final[tuple[RuntimeName, ...]] = ("docker", "podman", "bwrap")
STARTS: Final = 5
FOLLOW_UPS: Final = 500
GROUP: Final = Group(name="bench", folder="bench")

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

#: An agent that answers with the time at which our runner has given it a message.
CLOCK: Final = """
import queue, sys, time
sys.path.insert(0, "/app/src")
import wire

session, post = wire.open_session(wire.take_stdin()), queue.Queue()
session.listen(lambda message: post.put((message, time.monotonic())))
wire.emit(result="0", answers=0)
while (got := post.get())[0] is not None:
    wire.emit(result=str(got[1]), answers=got[0].id)
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
        async with engine.open_run(GROUP, "Hello?", chat_jid="tg:1") as run:
            output = await anext(run)
            answered = now()
            if output.status != "success":
                raise RuntimeError(output.error)
    container, interpreter, sdk = json.loads(await stamps.read_bytes())
    times = [started, container, interpreter, sdk, api.asked[0], answered]
    parts = [b - a for a, b in pairwise(times)]
    return [*parts, answered - started]


async def follow_up(settings: Settings) -> list[float]:
    """Return the seconds from each call of the host to its receipt by the agent."""
    waits: list[float] = []
    sent = 0.0
    async with (
        open_engine(settings) as engine,
        engine.open_run(GROUP, "Hello?", chat_jid="tg:1") as run,
    ):
        async for output in run:
            assert output.result is not None
            if sent:
                waits.append(float(output.result) - sent)
            if len(waits) == FOLLOW_UPS:
                break
            # As chats have it: nobody is at work.
            await trio.sleep(0.005)
            sent = time.monotonic()
            await run.send("and then?")
    return waits


async def main() -> None:
    """Print the tables."""
    starts = Table(title="Seconds from engine.run to the first answer (medians)")
    for name in ("", "container", "interpreter", "SDK", "CLI", "API and frame", "all"):
        starts.add_column(name, justify="right" if name else "left")
    follow_ups = Table(title="Milliseconds of a follow-up, host call to agent receipt")
    for name in ("", "p50", "p99", "worst"):
        follow_ups.add_column(name, justify="right" if name else "left")

    api = Api()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, api.serve, [listener])
        for runtime in RUNTIMES:
            with tempfile.TemporaryDirectory(prefix="clawtrio-bench-") as root:
                settings = make_root(Path(root), runtime, port)
                try:
                    waits = sorted(await follow_up(with_clock(settings)))
                    rounds = [await start_once(settings, api) for _ in range(STARTS)]
                except RuntimeUnavailableError as exc:
                    print(exc, file=sys.stderr)
                    continue
            medians = [statistics.median(part) for part in zip(*rounds, strict=True)]
            starts.add_row(runtime, *(f"{seconds:.2f}" for seconds in medians))
            found = statistics.median(waits), waits[len(waits) * 99 // 100], waits[-1]
            follow_ups.add_row(runtime, *(f"{wait * 1000:.2f}" for wait in found))
        nursery.cancel_scope.cancel()
    Console().print(starts)
    Console().print(follow_ups)


def make_root(root: Path, runtime: RuntimeName, port: int) -> Settings:
    """Make a bot's root, which has the API at that port."""
    root.chmod(0o755)
    (root / ".env").write_text(
        f"ANTHROPIC_API_KEY=key\nANTHROPIC_BASE_URL=http://127.0.0.1:{port}\n"
    )
    group = root / "groups" / GROUP.folder
    group.mkdir(parents=True)
    (group / "sitecustomize.py").write_text(SITE)
    if os.geteuid() == 0:
        os.chown(group, 1000, 1000)
    env = {"PYTHONPATH": "/workspace/group", "PYTHONDONTWRITEBYTECODE": "1"}
    return Settings(root=str(root), runtime=runtime, agent="claude", agent_env=env)


def with_clock(settings: Settings) -> Settings:
    """Have the agent that tells the time, in the same place."""
    return attrs.evolve(settings, agent_command=("python3", "-c", CLOCK), agent_env={})


if __name__ == "__main__":
    trio.run(main)
