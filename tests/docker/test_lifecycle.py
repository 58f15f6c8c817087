"""How real containers are started, stopped, found and removed."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import attrs
import pytest
import trio

from clawtrio._docker import DockerRuntime
from clawtrio._errors import RuntimeUnavailableError
from clawtrio._flavours import Flavour
from clawtrio._runtimes import LABEL_ROOT, LABEL_RUN, FoundContainer

from .conftest import House, finish, read_all, read_line, run

STAY = "import time; print('ready', flush=True); time.sleep(600)"
#: Leaves when the host is gone, and leaves word that it did.
LIFELINE = """
import sys
print("ready", flush=True)
sys.stdin.read()
open("/workspace/group/left", "w").close()
"""
LAST_WORDS = """
import signal, sys, time
def leave(*_):
    print("goodbye", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600)
"""
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {STAY}"


async def wait_found(
    runtime: DockerRuntime, labels: dict[str, str], count: int
) -> list[FoundContainer]:
    with trio.fail_after(10):
        while len(found := await runtime.find(labels)) != count:
            pass
    return list(found)


async def test_streams(runtime: DockerRuntime, house: House) -> None:
    """Bytes go in and out as they are, at once; end of file and exit code arrive."""
    program = """
import os, sys
while data := os.read(0, 65536):
    os.write(1, data)
os.write(2, b"done")
sys.exit(7)
"""
    data = bytes(range(256)) * 40 + b"\x10\x11\n"  # Ctrl-P Ctrl-Q among them
    with trio.fail_after(30):
        container = await runtime.start(house.spec(program))
        await container.verify()
        echoed = b""
        await container.stdin.send_all(data)
        while len(echoed) < len(data):
            echoed += await container.stdout.receive_some(65536)
        await container.stdin.aclose()
        result = await finish(container)

    assert echoed == data
    assert (result.code, result.stdout, result.stderr) == (7, "", "done")


async def test_stop_lets_the_agent_speak(runtime: DockerRuntime, house: House) -> None:
    """SIGTERM reaches the agent within a second, and its last words arrive."""
    with trio.fail_after(30):
        container = await runtime.start(house.spec(LAST_WORDS))
        assert await read_line(container.stdout) == "ready"
        started = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(container.stop, 10)
            assert await read_line(container.stdout) == "goodbye"
            assert time.monotonic() - started < 1
        result = await finish(container)

    assert result.code == 3


@pytest.mark.parametrize("grace", [0, 0.3])
async def test_stop_is_meant(
    runtime: DockerRuntime, house: House, grace: float
) -> None:
    """An agent that ignores SIGTERM is killed after the grace, in whole seconds."""
    with trio.fail_after(30):
        container = await runtime.start(house.spec(STUBBORN))
        assert await read_line(container.stdout) == "ready"
        started = time.monotonic()
        await container.stop(grace)
        result = await finish(container)

    assert result.code == 137
    assert time.monotonic() - started < 5


async def test_kill(runtime: DockerRuntime, house: House) -> None:
    """Kill kills, and killing or stopping what is gone is no error."""
    with trio.fail_after(30):
        container = await runtime.start(house.spec(STUBBORN))
        assert await read_line(container.stdout) == "ready"
        await container.kill()
        assert await container.wait() == 137
        await container.kill()
        await container.stop(1)
        container.kill_client()
        assert (await finish(container)).code == 137


async def test_stop_before_it_exists(
    runtime: DockerRuntime, house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """A container that is yet to come is no error; if it comes, it can be stopped."""
    with trio.fail_after(30):
        container = await runtime.start(house.spec(STAY))
        await container.stop(1)
        await container.kill()
        # Podman knows it so early that it may never come.
        if await container.stdout.receive_some(1):
            await container.kill()
        result = await finish(container)

    assert result.code in {137, 143}
    assert caplog.records == []


async def test_find_and_remove(runtime: DockerRuntime, house: House) -> None:
    """All of the labels must fit; what was found can be removed, twice even."""
    spec = house.spec(STUBBORN)
    with trio.fail_after(30):
        container = await runtime.start(spec)
        assert await read_line(container.stdout) == "ready"

        (found,) = await runtime.find(spec.labels)
        assert found == FoundContainer(found.id, spec.labels)
        assert len(found.id) == 64
        run_label = {LABEL_RUN: spec.labels[LABEL_RUN]}
        assert await runtime.find(run_label) == [found]
        assert await runtime.find({**run_label, LABEL_ROOT: "other"}) == []
        assert await runtime.find({LABEL_RUN: run_label[LABEL_RUN][:-1]}) == []

        started = time.monotonic()
        await runtime.remove(found.id)
        assert time.monotonic() - started < 5
        await wait_found(runtime, run_label, 0)
        await runtime.remove(found.id)
        result = await finish(container)

    assert result.code == 137
    assert container.start_failure(result.code, result.stderr) is None


async def test_what_is_being_stopped_can_be_removed(
    runtime: DockerRuntime, house: House
) -> None:
    """Its process ends too, though whoever was to stop it has gone."""
    spec = house.spec(STUBBORN)
    with trio.fail_after(30):
        container = await runtime.start(spec)
        assert await read_line(container.stdout) == "ready"
        with trio.move_on_after(1) as stopping:
            await container.stop(20)
        assert stopping.cancelled_caught
        (found,) = await runtime.find(spec.labels)
        await runtime.remove(found.id)

        assert (await finish(container)).code == 137


async def test_client_killed_alone(runtime: DockerRuntime, house: House) -> None:
    """Without its client the agent reads end of file, and leaves."""
    spec = house.spec(LIFELINE)
    with trio.fail_after(30):
        container = await runtime.start(spec)
        assert await read_line(container.stdout) == "ready"
        container.kill_client()
        assert (await finish(container)).code == 137
        with trio.fail_after(2):
            while not (house.group / "left").exists():  # noqa: ASYNC110
                await trio.sleep(0.01)
        await wait_found(runtime, dict(spec.labels), 0)


async def test_client_killed_during_create(
    runtime: DockerRuntime, house: House
) -> None:
    """What a killed client leaves is found by its labels, from the first moment."""
    with trio.fail_after(60):
        for delay in (0.02, 0.1, 0.2):
            spec = house.spec(STUBBORN)
            container = await runtime.start(spec)
            await trio.sleep(delay)
            container.kill_client()
            await finish(container)
            absent = 0
            while absent < 2:
                await trio.sleep(0.5)
                found = await runtime.find(spec.labels)
                absent = 0 if found else absent + 1
                for each in found:
                    await runtime.remove(each.id)


def monitors(name: str) -> list[int]:
    """Find who watches a container of that name: conmon; docker has no such process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            program, *arguments = path.read_text(errors="replace").split("\0")
            if program.endswith("conmon") and name in arguments:
                found.append(int(path.parent.name))
    return found


async def test_client_killed_once_conmon_is_there(
    runtime: DockerRuntime, house: House
) -> None:
    """Podman has not noted yet what it has begun, and yet none of it is left."""
    with trio.fail_after(60):
        for _ in range(5):
            spec = house.spec(STUBBORN)
            container = await runtime.start(spec)
            with trio.move_on_after(0.4):
                while not monitors(spec.name):  # noqa: ASYNC110 - another's
                    await trio.sleep(0.001)
            container.kill_client()
            await finish(container)
            # Podman may have forgotten the container by now, too.
            await runtime.remove(spec.name)
            assert await runtime.find(spec.labels) == []
            assert monitors(spec.name) == []


async def test_verify_gives_up_with_the_client(
    runtime: DockerRuntime, house: House
) -> None:
    """A client that never gets its container running holds nobody up."""
    spec = attrs.evolve(house.spec(STAY), name="no/name")
    with trio.fail_after(30):
        container = await runtime.start(spec)
        await container.verify()
        result = await finish(container)

    failure = container.start_failure(result.code, result.stderr)
    assert failure is not None
    assert "no/name" in failure or "must match" in failure


async def test_source_vanished(
    runtime: DockerRuntime, house: House, tmp_path: Path
) -> None:
    """A runtime that cannot mount says so, in its own words and one line."""
    source = tmp_path / "gone"
    source.mkdir()
    spec = house.spec(STAY, house.hold(source, "/workspace/extra/x"))
    source.rmdir()

    result = await run(runtime, spec)
    container = await runtime.start(spec)
    await finish(container)

    failure = container.start_failure(result.code, result.stderr)
    assert failure is not None
    assert str(source) in failure
    assert "\n" not in failure
    assert not failure.startswith(("docker:", "Error"))


async def test_no_such_program(flavour: Flavour, house: House, tmp_path: Path) -> None:
    """An image without a python3 is a failure of the start, not of the agent."""
    image = f"clawtrio-test-docker-{flavour.name}-empty:latest"
    (tmp_path / "Dockerfile").write_text("FROM scratch\nLABEL clawtrio.protocol=1\n")
    build = [flavour.name, "build", "-t", image, str(tmp_path)]
    await trio.run_process(build, capture_stdout=True, capture_stderr=True)
    runtime = DockerRuntime(flavour, image=image)
    await runtime.check()
    assert runtime.takes_runner

    with trio.fail_after(30):
        container = await runtime.start(house.spec(STAY))
        await container.verify()
        result = await finish(container)

    failure = container.start_failure(result.code, result.stderr)
    assert failure is not None
    assert "exec" in failure
    assert result.code in {127, 1}


@pytest.mark.parametrize("code", [125, 126, 127])
async def test_own_exit_code(runtime: DockerRuntime, house: House, code: int) -> None:
    """An agent may leave with the runtime's codes, and was started all the same."""
    program = f"""
import sys
sys.stdin.read()
sys.stderr.write("Error: x\\n")
sys.exit({code})
"""
    with trio.fail_after(30):
        container = await runtime.start(house.spec(program))
        await container.verify()
        await container.stdin.aclose()
        result = await finish(container)

    assert result.code == code
    assert container.start_failure(result.code, result.stderr) is None


async def test_other_protocol(flavour: Flavour, tmp_path: Path) -> None:
    """An image that speaks another protocol is refused."""
    image = f"clawtrio-test-docker-{flavour.name}-other:latest"
    (tmp_path / "Dockerfile").write_text("FROM scratch\nLABEL clawtrio.protocol=2\n")
    build = [flavour.name, "build", "-t", image, str(tmp_path)]
    await trio.run_process(build, capture_stdout=True, capture_stderr=True)

    with trio.fail_after(30), pytest.raises(RuntimeUnavailableError) as caught:
        await DockerRuntime(flavour, image=image).check()

    assert "protocol '2', not '1'" in caught.value.problem


async def test_hanging_order(
    runtime: DockerRuntime,
    house: House,
    flavour: Flavour,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stop command that hangs ends with its caller's patience."""
    fake = tmp_path / "bin" / flavour.name
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho $$ >> "$0.pids"\nexec sleep 600\n')
    fake.chmod(0o755)
    with trio.fail_after(30):
        container = await runtime.start(house.spec(STAY))
        assert await read_line(container.stdout) == "ready"
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
            started = time.monotonic()
            for order in (container.kill, lambda: container.stop(1)):
                with trio.move_on_after(0.3) as scope:
                    await order()
                assert scope.cancelled_caught
            assert time.monotonic() - started < 1
            pids = await trio.Path(f"{fake}.pids").read_text()
            for pid in pids.split():
                with pytest.raises(ProcessLookupError):
                    os.kill(int(pid), 0)
        await container.kill()
        await finish(container)


async def test_unreachable_engine(
    flavour: Flavour,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    house: House,
) -> None:
    """Where no engine answers, all says so; and there is a remedy."""
    runtime = DockerRuntime(flavour, image="any")
    with monkeypatch.context() as patch, trio.fail_after(60):
        patch.setenv("DOCKER_HOST", "unix:///nonexistent")
        patch.setenv("CONTAINER_HOST", "unix:///nonexistent")
        # With this, Podman asks an engine elsewhere too.
        patch.setenv("CONTAINERS_CONF", str(house.path / "containers.conf"))
        (house.path / "containers.conf").write_text("[engine]\nremote = true\n")
        for call in (runtime.check(), runtime.find({}), runtime.remove("x")):
            with pytest.raises(RuntimeUnavailableError) as caught:
                await call
            assert "onnect" in caught.value.problem
            assert caught.value.remedy == flavour.start
        container = await runtime.start(house.spec(STAY))
        caplog.set_level(logging.WARNING)
        await container.stop(0)
        assert "stop failed: " in caplog.text
        result = await finish(container)
        assert container.start_failure(result.code, result.stderr)


async def test_slow_reader_is_waited_for(runtime: DockerRuntime, house: House) -> None:
    """What nobody reads yet is neither lost nor kept in memory without end."""
    program = "import sys; [sys.stdout.write('x' * 65536) for _ in range(64)]"
    with trio.fail_after(30):
        container = await runtime.start(house.spec(program))
        await trio.sleep(1)
        stdout = await read_all(container.stdout)
        await finish(container)

    assert len(stdout) == 64 * 65536
