"""One sandbox, from its start to its end.

``bwrap`` forks into the sandbox's pid 1, the reaper, which starts the agent; the outer
one stays as our client, and leaves with the agent's exit code. It dies with the thread
that spawned it (see :mod:`clawtrio._process`), the reaper with it, and all of the
sandbox with the reaper.
"""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import ExitStack
from functools import partial
from typing import Final

import trio
from trio.lowlevel import FdStream

from ._bwrap_procs import find_agent, open_process, read_process, signal_process
from ._netns import cannot_listen, listen_inside, open_network_of
from ._process import ClientProcess, in_thread
from ._text import one_line

#: What is granted for a report that bwrap should have made already.
_REPORT_TIMEOUT: Final = 0.5
#: Building a sandbox takes 10 ms, and much longer on a busy host.
_ARM_TIMEOUT: Final = 5.0
_ARM_INTERVAL: Final = 0.002
#: The kernel kills what is left of a sandbox within milliseconds.
_REAP_TIMEOUT: Final = 5.0
#: From here on an exit code means a signal.
_SIGNALLED: Final = 128
#: What those that come before the agent exit with when they fail.
_TOOL_FAILED: Final = frozenset({1, 126, 127})
#: What util-linux has them say then; the agent can say so, too, but little else.
_TOOL_MESSAGE: Final = re.compile(
    r"(?:setpriv|prlimit): failed to execute .+"
    r"|setpriv: (?:(?:set(?:resuid|resgid|groups)|disallow granting new privileges"
    r"|set process securebits) failed|apply (?:bounding set|capabilities)"
    r"|(?:re)?activate capabilities): .+"
    r"|prlimit: failed to (?:[gs]et the \w+ resource|get old \w+) limit: .+"
)


class BwrapContainer:
    """A sandbox, seen through its outer bwrap."""

    def __init__(self, client: ClientProcess, report: int) -> None:
        self._client = client
        self._report_stream = FdStream(report)
        self._report = b""
        self._reported = False
        self._reaper: int | None = None
        self._reaper_pid = 0
        self._reading = trio.Lock()
        self._waiting = trio.Lock()

    @property
    def stdin(self) -> trio.abc.SendStream:
        """Where the agent reads."""
        return self._client.stdin

    @property
    def stdout(self) -> trio.abc.ReceiveStream:
        """What the agent writes."""
        return self._client.stdout

    @property
    def stderr(self) -> trio.abc.ReceiveStream:
        """What the agent and bwrap complain of."""
        return self._client.stderr

    @property
    def process(self) -> int | None:
        """The reaper's id."""
        return None if self._reaper is None else self._reaper_pid

    async def verify(self) -> None:
        """Wait until the sandbox cannot outlive us.

        There are no mounts to compare: bwrap mounts by descriptor, compares device and
        inode itself, and starts no agent if they differ. But the reaper takes its
        parent-death signal late, some milliseconds after it was forked. Until then
        only the end of stdin tells the agent that we are gone, so nothing should be
        written there that makes it do more than look.
        """
        await self._find_reaper()
        with trio.move_on_after(_ARM_TIMEOUT):
            while self._reaper is not None:
                client = read_process(self._client.pid)
                reaper = read_process(self._reaper_pid)
                if client is None or reaper is None:
                    return
                # Its filter is the next thing that it takes.
                if reaper.filters > client.filters:
                    return
                await trio.sleep(_ARM_INTERVAL)

    async def listen(self, port: int) -> trio.SocketListener:
        """Open a port on the sandbox's loopback."""
        with ExitStack() as held:
            try:
                process = os.open(f"/proc/{self._reaper_pid}", os.O_PATH | os.O_CLOEXEC)
                held.callback(os.close, process)
                if self._reaper is None:
                    raise ProcessLookupError("it does not run")
                # While a pidfd can be signalled, nobody else has got the number.
                signal.pidfd_send_signal(self._reaper, 0)
                network = open_network_of(process)
            except OSError as exc:
                raise cannot_listen("bwrap", port, exc) from exc
            held.callback(os.close, network)
            return await listen_inside("bwrap", network, port)

    async def wait(self) -> int:
        """Wait until bwrap has exited, and all that was in the sandbox is gone."""
        async with self._waiting:
            async with trio.open_nursery() as nursery:
                # The reaper can be told from a stranger only while bwrap lives.
                nursery.start_soon(self._find_reaper)
                code = await self._client.wait()
                nursery.cancel_scope.deadline = trio.current_time() + _REPORT_TIMEOUT
            if self._reaper is not None:
                signal_process(self._reaper, signal.SIGKILL)
                with trio.move_on_after(_REAP_TIMEOUT):
                    await trio.lowlevel.wait_readable(self._reaper)
            self._read_rest()
        return code

    async def stop(self, grace: float) -> None:
        """Send the agent ``SIGTERM``; kill the sandbox *grace* seconds later."""
        with trio.move_on_after(grace):
            await self._find_reaper()
            if await self._ask_to_leave():
                await self.wait()
                return
        await self.kill()

    async def kill(self) -> None:
        """Kill the sandbox from both ends."""
        # Without its reaper known, one that is starting might outlive its bwrap.
        with trio.move_on_after(_REPORT_TIMEOUT):
            await self._find_reaper()
        if self._reaper is not None:
            signal_process(self._reaper, signal.SIGKILL)
        self._client.kill()

    def kill_client(self) -> None:
        """Kill the outer bwrap; the reaper follows."""
        self._client.kill()

    def start_failure(self, exit_code: int, stderr: str) -> str | None:
        """Tell whether there was never an agent.

        bwrap reports an exit code only if it could execute what it was given. After
        that, setpriv and prlimit may still have failed: they say so in their own name.
        """
        lines = [line for line in stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        if b'"exit-code"' in self._report:
            tool_failed = exit_code in _TOOL_FAILED and _TOOL_MESSAGE.fullmatch(last)
            return one_line(last) if tool_failed else None
        if exit_code >= _SIGNALLED:
            return None
        return one_line(last) or f"bwrap left with code {exit_code}"

    async def aclose(self) -> None:
        """Give back pipes and descriptors."""
        if self._reaper is not None:
            trio.lowlevel.notify_closing(self._reaper)
            os.close(self._reaper)
            self._reaper = None
        try:
            await trio.aclose_forcefully(self._report_stream)
        finally:
            await self._client.aclose()

    async def _find_reaper(self) -> None:
        """Wait for the first line of the report, and open the process it names."""
        async with self._reading:
            while not self._reported:
                try:
                    chunk = await self._report_stream.receive_some()
                except trio.ClosedResourceError:
                    return
                self._report += chunk
                self._reported = not chunk or b"\n" in self._report
                if not self._reported or not chunk:
                    continue
                self._reaper_pid = json.loads(self._report.splitlines()[0])["child-pid"]
                reaper = read_process(self._reaper_pid)
                # Another parent means another process, or a sandbox that is ending.
                if reaper is not None and reaper.parent == self._client.pid:
                    self._reaper = open_process(reaper)

    async def _ask_to_leave(self) -> bool:
        """Send the agent ``SIGTERM``; False if there is none."""
        reaper = read_process(self._reaper_pid) if self._reaper is not None else None
        if reaper is None:
            return False
        agent = await in_thread(partial(find_agent, reaper), abandon_on_cancel=True)
        pidfd = open_process(agent) if agent is not None else None
        if pidfd is None:
            return False
        try:
            signal_process(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)
        return True

    def _read_rest(self) -> None:
        """Read what bwrap reported last. It is gone, and the pipe does not block."""
        try:
            while chunk := os.read(self._report_stream.fileno(), 4096):
                self._report += chunk
        except OSError:
            # Somebody else holds the other end, or it was closed on our side.
            return
