"""How a real sandbox starts, is stopped, is found, and leaves nothing behind."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from clawtrio._bwrap import BwrapRuntime
from clawtrio._bwrap_argv import Host
from clawtrio._bwrap_container import BwrapContainer
from clawtrio._bwrap_procs import read_process
from clawtrio._errors import NotStartedError, RuntimeUnavailableError
from clawtrio._runtimes import LABEL_RUN

from .conftest import IS_ROOT, Sandbox, read_line

pytestmark = pytest.mark.bwrap

POLITE = """
    import signal, sys
    def leave(number, frame):
        print("last words", flush=True)
        sys.exit(3)
    signal.signal(signal.SIGTERM, leave)
    print("up", flush=True)
    signal.pause()
"""

DEAF = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    time.sleep(600)
"""

IDLE = """
    import time
    print("up", flush=True)
    time.sleep(600)
"""

DAEMON = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        print("up", flush=True)
        time.sleep(600)
    time.sleep(0.2)
"""


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def missing_tool(host: Host, tool: str, path: str) -> Host:
    changes: dict[str, Any] = {tool: path}
    return attrs.evolve(host, **changes)


async def is_gone(pid: int, *, within: float) -> bool:
    """Tell whether *pid* goes away in time; a zombie is gone."""
    with trio.move_on_after(within):
        while read_process(pid) is not None:  # noqa: ASYNC110 - not our child
            await trio.sleep(0.01)
        return True
    return False


async def test_check() -> None:
    """A host that can run these tests passes the check, more than once."""
    runtime = BwrapRuntime()
    before = open_descriptors()

    with trio.fail_after(60):
        await runtime.check()
        await runtime.check()

    assert open_descriptors() == before
    assert runtime.compares_mounts
    assert (runtime.name, runtime.in_process, runtime.takes_runner) == (
        "bwrap",
        False,
        True,
    )


async def test_stdin_reaches_the_agent(sandbox: Sandbox) -> None:
    """Lines go in and answers come out while it runs; its exit code comes last."""
    agent = """
        import sys
        for line in sys.stdin:
            print(line.upper(), end="", flush=True)
        sys.exit(7)
    """
    async with sandbox.start(sandbox.spec(agent)) as container:
        await container.stdin.send_all(b"one\n")
        assert await read_line(container) == "ONE"
        await container.stdin.send_all(b"two\n")
        assert await read_line(container) == "TWO"
        await container.stdin.aclose()

        assert (await sandbox.finish(container)).code == 7


async def test_stop_asks_the_agent(sandbox: Sandbox) -> None:
    """SIGTERM reaches the agent itself, at once, and what it then says arrives."""
    async with sandbox.start(sandbox.spec(POLITE)) as container:
        assert await read_line(container) == "up"
        started = trio.current_time()
        await container.stop(10)
        elapsed = trio.current_time() - started
        result = await sandbox.finish(container)

    assert elapsed < 1
    assert result.code == 3
    assert result.stdout == "last words\n"
    assert result.failure is None


async def test_stop_with_endless_grace(sandbox: Sandbox) -> None:
    """A grace without end is one."""
    async with sandbox.start(sandbox.spec(POLITE)) as container:
        await read_line(container)
        with trio.fail_after(5):
            await container.stop(math.inf)

        assert await container.wait() == 3


async def test_stop_kills_the_deaf(sandbox: Sandbox) -> None:
    """An agent that ignores SIGTERM is killed after the grace."""
    async with sandbox.start(sandbox.spec(DEAF)) as container:
        assert await read_line(container) == "up"
        started = trio.current_time()
        await container.stop(0.3)
        result = await sandbox.finish(container)

    assert 0.3 <= trio.current_time() - started < 2
    assert result.code == 137
    assert result.failure is None


async def test_stop_and_kill_before_there_is_an_agent(sandbox: Sandbox) -> None:
    """A sandbox that is still being built is killed at once, by either."""
    for stop in (True, False):
        container = await sandbox.runtime.start(sandbox.spec(IDLE))
        with trio.fail_after(5):
            if stop:
                await container.stop(10)
            else:
                await container.kill()
            await container.wait()
        await container.aclose()

    spec = sandbox.spec(IDLE)
    assert await sandbox.runtime.find({LABEL_RUN: spec.labels[LABEL_RUN]}) == []


async def test_all_is_idempotent_at_the_end(sandbox: Sandbox) -> None:
    """After the exit there is nothing to verify, stop or kill, and that is no error."""
    async with sandbox.start(sandbox.spec("print('done')")) as container:
        await sandbox.finish(container)
        with trio.fail_after(5):
            await container.verify()
            await container.stop(10)
            await container.kill()
            container.kill_client()
            assert await container.wait() == 0


async def test_two_may_wait(sandbox: Sandbox) -> None:
    """Several tasks may wait; all get the code, and one may be cancelled."""
    codes = []

    async def wait(container: BwrapContainer | object) -> None:
        codes.append(await container.wait())  # type: ignore[union-attr]

    async with sandbox.start(sandbox.spec(POLITE)) as container:
        await read_line(container)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, container)
                nursery.start_soon(wait, container)
                with trio.move_on_after(0.05):
                    await container.wait()
                await container.stop(5)

    assert codes == [3, 3]


async def test_daemons_go_with_the_agent(sandbox: Sandbox) -> None:
    """What the agent left running is gone when wait() returns, and its pipes closed."""
    async with sandbox.start(sandbox.spec(DAEMON)) as container:
        with trio.fail_after(5):
            assert await container.wait() == 0
            assert await container.stdout.receive_some() == b"up\n"
            assert await container.stdout.receive_some() == b""


async def test_killed_client(sandbox: Sandbox) -> None:
    """SIGKILL of the outer bwrap takes the sandbox along."""
    spec = sandbox.spec(IDLE)
    async with sandbox.start(spec) as container:
        await read_line(container)
        assert len(await sandbox.runtime.find(spec.labels)) == 1
        container.kill_client()
        result = await sandbox.finish(container)

        assert result.code == 137
        assert result.failure is None
        assert await sandbox.runtime.find(spec.labels) == []


async def test_find_and_remove(sandbox: Sandbox) -> None:
    """Sandboxes are found by their labels from the start, and are gone when removed."""
    runtime = sandbox.runtime
    one, two = sandbox.spec(IDLE, run="one"), sandbox.spec(IDLE, run="two")
    async with sandbox.start(one) as first, sandbox.start(two) as second:
        found = await runtime.find(one.labels)
        assert [container.labels for container in found] == [one.labels]
        assert len(await runtime.find({**one.labels, LABEL_RUN: "three"})) == 0
        mine = {name: one.labels[name] for name in one.labels if name != LABEL_RUN}
        assert len(await runtime.find(mine)) == 2

        with trio.fail_after(5):
            await runtime.remove(found[0].id)
            await runtime.remove(found[0].id)
            assert await first.wait() == 137
        assert await runtime.find(one.labels) == []

        await read_line(second)
        assert len(await runtime.find(two.labels)) == 1


@pytest.mark.parametrize("container_id", ["2000000000:1", f"{os.getpid()}:1"])
async def test_remove_what_is_gone(sandbox: Sandbox, container_id: str) -> None:
    """An id whose process is gone, or whose pid has another process now, is nothing."""
    with trio.fail_after(5):
        await sandbox.runtime.remove(container_id)


if not IS_ROOT:  # who may kill everybody's, and is not asked to

    async def test_remove_of_another_user(sandbox: Sandbox) -> None:
        """Another user's process is not killed, and that is said."""
        init = read_process(1)
        assert init is not None
        with pytest.raises(RuntimeUnavailableError, match="another user"):
            await sandbox.runtime.remove(init.id)


async def test_orphaned_reaper(sandbox: Sandbox) -> None:
    """A sandbox whose bwrap was killed while it was built is found and removed."""
    spec = sandbox.spec(IDLE)
    for _ in range(20):
        container = await sandbox.runtime.start(spec)
        assert isinstance(container, BwrapContainer)
        # It has reported its reaper, which has no parent-death signal yet.
        await container._find_reaper()
        container.kill_client()
        await container._client.wait()
        found = await sandbox.runtime.find(spec.labels)
        with trio.fail_after(5):
            for orphan in found:
                assert orphan.labels == spec.labels
                await sandbox.runtime.remove(orphan.id)
        assert await sandbox.runtime.find(spec.labels) == []
        await container.aclose()
        if found:
            break
    else:
        pytest.fail("no sandbox was orphaned")


async def test_twenty_at_once(sandbox: Sandbox) -> None:
    """Twenty sandboxes start together, each with its own pipes."""
    answers = []

    async def run(number: int) -> None:
        spec = sandbox.spec(f"print({number})", run=str(number))
        answers.append((number, (await sandbox.run(spec)).stdout))

    sandbox.directory("group")
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(run, number)

    assert sorted(answers) == [(number, f"{number}\n") for number in range(20)]


async def test_nothing_leaks(sandbox: Sandbox) -> None:
    """Descriptors and threads are as before: after runs, failures and cancellation."""
    spec = sandbox.spec("print(1)")
    await sandbox.run(spec)
    missing = BwrapRuntime(bwrap="/nonexistent/bwrap")
    missing._known_host()
    missing._host = attrs.evolve(missing._known_host(), choom="/nonexistent/choom")
    before = open_descriptors()
    threads = threading.active_count()

    for _ in range(3):
        await sandbox.run(spec)
        with pytest.raises(NotStartedError, match="choom"):
            await missing.start(spec)
        with trio.CancelScope() as scope:
            scope.cancel()
            await sandbox.runtime.start(spec)

    assert open_descriptors() == before
    assert threading.active_count() <= threads + 1
    assert await sandbox.runtime.find(spec.labels) == []


@pytest.mark.parametrize("tool", ["setpriv", "prlimit", "python"])
async def test_missing_programs(sandbox: Sandbox, tool: str) -> None:
    """A program that is missing inside means that there was no agent."""
    if tool == "setpriv" and not IS_ROOT:
        pytest.skip("only root needs it")
    spec = sandbox.spec("print(1)")
    host = sandbox.runtime._known_host()
    sandbox.runtime._host = missing_tool(host, tool, "/usr/bin/nonexistent")

    result = await sandbox.run(spec)

    assert result.failure is not None
    assert "/usr/bin/nonexistent" in result.failure


async def test_failing_agents_did_start(sandbox: Sandbox) -> None:
    """An agent that fails like a runtime, but in its own name, is an agent."""
    agent = "import sys; print('python: no such file', file=sys.stderr); sys.exit(127)"

    result = await sandbox.run(sandbox.spec(agent))

    assert (result.code, result.failure) == (127, None)


async def test_missing_bwrap(sandbox: Sandbox) -> None:
    """A bubblewrap that is not there fails the check, by name."""
    runtime = BwrapRuntime(bwrap="/nonexistent/bwrap")

    with pytest.raises(RuntimeUnavailableError, match="/nonexistent/bwrap"):
        await runtime.check()
    sandbox.runtime = runtime
    result = await sandbox.run(sandbox.spec("print(1)"))
    assert result.failure is not None


async def test_closed_under_a_reader(sandbox: Sandbox) -> None:
    """Closing while another task waits ends that wait, with Trio's own error."""
    container = await sandbox.runtime.start(sandbox.spec(IDLE))
    await read_line(container)
    container.kill_client()
    assert await container.wait() == 137
    await container.aclose()
    with trio.fail_after(1):
        await container.verify()
        await container.kill()


HOST = """
import sys
from contextlib import ExitStack
from pathlib import Path
import trio
from tests_bwrap.conftest import Sandbox

async def main():
    with ExitStack() as held:
        sandbox = Sandbox(Path(sys.argv[1]), held)
        spec = sandbox.spec(sys.argv[2])
        async with sandbox.start(spec) as container:
            await container.stdout.receive_some()
            (found,) = await sandbox.runtime.find(spec.labels)
            print(found.id, container._reaper_pid, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


async def test_killed_host(sandbox: Sandbox, tmp_path: Path) -> None:
    """SIGKILL of the host process takes its sandboxes along within a second."""
    here = Path(__file__).parent
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "tests_bwrap").symlink_to(here)
    path = [str(tmp_path / "lib"), *(entry for entry in sys.path if entry)]
    host = subprocess.Popen(  # noqa: ASYNC220 - killed hard, then read to its end
        [sys.executable, "-c", HOST, tmp_path, DEAF],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.PIPE,
    )
    with host:
        assert host.stdout is not None
        line = await trio.to_thread.run_sync(host.stdout.readline)
        pids = [int(word.split(b":")[0]) for word in line.split()]
        assert len(pids) == 2
        assert all(read_process(pid) for pid in pids)
        host.kill()

        for pid in pids:
            assert await is_gone(pid, within=1)


@pytest.mark.slow
async def test_idle_threads_do_not_kill(sandbox: Sandbox) -> None:
    """A sandbox outlives Trio's worker threads, which expire after 10 s."""
    async with sandbox.start(sandbox.spec(POLITE)) as container:
        await read_line(container)
        started = time.monotonic()
        with trio.move_on_after(12):
            await container.wait()
        assert time.monotonic() - started > 11
        await container.stop(5)

        assert await container.wait() == 3


async def test_signals_are_not_lost_on_the_way(sandbox: Sandbox) -> None:
    """A stop that is cancelled ends at once; the agent has its signal all the same."""
    agent = POLITE.replace(
        'print("last words"', 'import time; time.sleep(1); print("x"'
    )
    async with sandbox.start(sandbox.spec(agent)) as container:
        await read_line(container)
        started = trio.current_time()
        with trio.move_on_after(0.3):
            await container.stop(10)
        assert trio.current_time() - started < 0.6

        result = await sandbox.finish(container)
    assert (result.code, result.stdout) == (3, "x\n")
