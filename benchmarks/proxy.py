"""What does the credential proxy cost, next to a plain one in Node?

Both are processes of their own, between the same client and the same API, which are
this process; they are measured in turn. The machine may be busy: look at the ratios,
and at the processor time, which others do not change. ``python benchmarks/proxy.py``
prints tables; Node must be installed.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import attrs
import trio
import trio.lowlevel
from report import Report, memory_of

#: What the Claude CLI sends, and an answer of a few sentences.
REQUEST_BODY = b"x" * 42_000
RESPONSE_BODY = b'{"type":"message","usage":{"output_tokens":5}}'.ljust(1000)
EVENT = b"event: content_block_delta\ndata: %b\n\n" % (b'{"delta":"x"}'.ljust(150))
CLIENTS = 8
REQUESTS = 400
STREAMS = 100
EVENTS = 200
ROUNDS = 5

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: "
ANSWER = HEAD + b"application/json\r\nContent-Length: 1000\r\n\r\n" + RESPONSE_BODY
STREAM = HEAD + b"text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"0\r\n\r\n"

#: What was found in each round, of ours and of Node's.
Found = tuple[list[list[float]], list[list[float]]]


async def serve_api(stream: trio.SocketStream) -> None:
    """Be the API: a JSON answer, or events one by one if the request is short."""
    buffer = b""
    while True:
        while b"\r\n\r\n" not in buffer:
            data = await stream.receive_some(2**17)
            if not data:
                return
            buffer += data
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        if b"content-length: 42000" in head.lower():
            while len(buffer) < len(REQUEST_BODY):
                buffer += await stream.receive_some(2**17)
            buffer = buffer[len(REQUEST_BODY) :]
            await stream.send_all(ANSWER)
            continue
        await stream.send_all(STREAM)
        for _ in range(EVENTS):
            await stream.send_all(CHUNK)
            await trio.lowlevel.checkpoint()
        await stream.send_all(LAST)


@attrs.frozen
class Peer:
    """A proxy to measure.

    Attributes:
        name: What it is called.
        pid: Its process.
        port: Where it listens.
        token: What it wants to see.
    """

    name: str
    pid: int
    port: int
    token: str

    def processor_time(self) -> float:
        """Return the seconds that it has worked."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the MiB that it occupies."""
        return memory_of(self.pid) / 2**20

    def request(self, length: int) -> bytes:
        """Write a head."""
        return (
            b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: %b\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (self.token.encode(), length)
        )


async def ask(peer: Peer, times: int, waits: list[float]) -> None:
    """Ask for JSON, again and again; note how long each first byte took."""
    wanted = peer.request(len(REQUEST_BODY)) + REQUEST_BODY
    async with await trio.open_tcp_stream("127.0.0.1", peer.port) as stream:
        for _ in range(times):
            started = trio.current_time()
            await stream.send_all(wanted)
            got = await stream.receive_some(2**16)
            waits.append(trio.current_time() - started)
            while len(got) < got.index(b"\r\n\r\n") + 4 + len(RESPONSE_BODY):
                got += await stream.receive_some(2**16)


async def follow(peer: Peer, begun: list[float], peak: list[float]) -> None:
    """Read a stream of events to its end."""
    async with await trio.open_tcp_stream("127.0.0.1", peer.port) as stream:
        started = trio.current_time()
        await stream.send_all(peer.request(0))
        tail = b""
        size = 0
        while not tail.endswith(LAST):
            data = await stream.receive_some(2**16)
            if not data:
                raise RuntimeError(f"{peer.name} broke a stream off")
            if not size:
                begun.append(trio.current_time() - started)
                peak.append(peer.memory())
            size += len(data)
            tail = (tail + data)[-len(LAST) :]
        if size < EVENTS * len(EVENT):
            raise RuntimeError(f"{peer.name} lost events")


async def measure_requests(peer: Peer) -> tuple[float, float, float]:
    """Return requests/s, ms to the first byte, and ms of processor time for each."""
    waits: list[float] = []
    worked, started = peer.processor_time(), trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(CLIENTS):
            nursery.start_soon(ask, peer, REQUESTS // CLIENTS, waits)
    rate = REQUESTS / (trio.current_time() - started)
    worked = (peer.processor_time() - worked) / REQUESTS
    return rate, statistics.median(waits) * 1e3, worked * 1e3


async def measure_streams(peer: Peer) -> tuple[float, float, float, float]:
    """Return events/s, ms to the first byte, µs of processor time for each, and MiB."""
    begun: list[float] = []
    peak: list[float] = []
    worked, started = peer.processor_time(), trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(follow, peer, begun, peak)
    events = STREAMS * EVENTS
    rate = events / (trio.current_time() - started)
    worked = (peer.processor_time() - worked) / events
    return rate, statistics.median(begun) * 1e3, worked * 1e6, max(peak)


async def measure_alone(peer: Peer) -> float:
    """Return the ms to the first byte of one client alone."""
    waits: list[float] = []
    await ask(peer, 50, waits)
    return statistics.median(waits) * 1e3


@asynccontextmanager
async def running(name: str, *argv: str) -> AsyncIterator[Peer]:
    """Have a proxy, which says first where it is and what it wants to see."""
    start = partial(
        trio.lowlevel.open_process, argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    process = await start()
    assert process.stdout is not None
    try:
        line = b""
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some()
        port, token = line.decode().split()
        yield Peer(name, process.pid, int(port), token)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def measure() -> Found:
    """Measure both, in turn."""
    (api,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = str(api.socket.getsockname()[1])
    peers = Path(__file__).parent / "peers"
    async with (
        trio.open_nursery() as nursery,
        running("clawtrio", sys.executable, str(peers / "proxy_ours.py"), port) as ours,
        running("Node", "node", str(peers / "proxy.js"), port) as node,
    ):
        await nursery.start(trio.serve_listeners, serve_api, [api])
        found: dict[str, list[list[float]]] = {ours.name: [], node.name: []}
        for peer in (ours, node):
            await measure_requests(peer)
        for number in range(ROUNDS):
            print(f"proxy: round {number + 1} of {ROUNDS}", file=sys.stderr)
            for peer in (ours, node):
                figures = [*await measure_requests(peer), await measure_alone(peer)]
                figures += await measure_streams(peer)
                found[peer.name].append(figures)
        nursery.cancel_scope.cancel()
    return found[ours.name], found[node.name]


def show(report: Report, found: Found) -> None:
    """Report medians, and the medians of the ratios of each round."""
    rows = []
    names = (
        f"requests/s, {CLIENTS} clients, 42 kB",
        "ms to the first byte, the same",
        "ms of processor time per request",
        "ms to the first byte, one client",
        f"events/s, {STREAMS} streams at once",
        "ms to the first byte, the same",
        "µs of processor time per event",
        f"MiB of memory with {STREAMS} streams",
    )
    for number, name in enumerate(names):
        mine, theirs = ([figures[number] for figures in one] for one in found)
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        medians = [f"{statistics.median(values):,.2f}" for values in (mine, theirs)]
        rows.append((name, *medians, f"{ratio:.2f}"))
    columns = ("median", "clawtrio", "Node", "ratio")
    report.table("The credential proxy and a plain Node one", columns, rows)


def main() -> int:
    """Measure all; return the exit code."""
    report = Report("proxy")
    show(report, trio.run(measure))
    return report.finish()


if __name__ == "__main__":
    if not shutil.which("node"):
        sys.exit("Node is not installed: there is nothing to compare with")
    sys.exit(main())
