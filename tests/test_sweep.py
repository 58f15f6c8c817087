"""What engines that died have left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from clawtrio import (
    Container,
    ContainerSpec,
    FoundContainer,
    RuntimeUnavailableError,
    Settings,
)
from clawtrio._groups import Places, open_places
from clawtrio._hostfs import Directory
from clawtrio._sweep import EngineFile, sweep

from .helpers import open_descriptors


class Shelf:
    """A runtime with containers that nobody has started."""

    in_process = True
    takes_runner = True
    compares_mounts = True

    def __init__(self, name: str = "docker") -> None:
        self.name = name
        self.containers: dict[str, dict[str, str]] = {}
        self.stuck: set[str] = set()
        self.slowness = 0.0
        self.networks: list[str] = []

    def put(self, container_id: str, **labels: str) -> None:
        """Have a container, labelled clawtrio.<name>."""
        self.containers[container_id] = {
            f"clawtrio.{name}": value for name, value in labels.items()
        }

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()

    async def open_network(self, labels: Mapping[str, str]) -> None:
        raise NotImplementedError(labels)

    async def close_network(self, labels: Mapping[str, str]) -> None:
        await trio.lowlevel.checkpoint()
        if "network" in self.stuck:
            raise RuntimeUnavailableError(self.name, "it is in use", "Leave.")
        self.networks.append(labels["clawtrio.engine"])

    async def gateway(self, labels: Mapping[str, str]) -> tuple[str, str]:
        raise NotImplementedError(labels)

    def argv(self, spec: ContainerSpec) -> Sequence[str]:
        return (spec.name,)

    async def start(self, spec: ContainerSpec) -> Container:
        raise NotImplementedError(spec)

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        await trio.sleep(self.slowness)
        return [
            FoundContainer(container_id, has)
            for container_id, has in self.containers.items()
            if labels.items() <= has.items()
        ]

    async def remove(self, container_id: str) -> None:
        await trio.sleep(self.slowness / 2)
        if container_id in self.stuck:
            raise RuntimeUnavailableError(self.name, "it is stuck", "Pull.")
        del self.containers[container_id]


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Count descriptors: none may be left, whatever happened."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """Hold the places of a root."""
    with open_places(Settings(root=str(tmp_path))) as places:
        yield places


def dead_engine(places: Places, runtime: str = "docker") -> str:
    """Leave the file of an engine that was killed."""
    engine = EngineFile(places.engines, runtime)
    engine.release(clean=False)
    return engine.engine_id


def pass_time(places: Places, seconds: float) -> None:
    """Have the files of engines be older."""
    for name in places.engines.names():
        path = Path(places.engines.path, name)
        modified = path.stat().st_mtime - seconds
        os.utime(path, (modified, modified))


async def test_what_a_dead_engine_left_is_removed(places: Places) -> None:
    """Its containers go, and are told; later its file goes."""
    runtime = Shelf()
    dead = dead_engine(places)
    runtime.put("a", root=places.root_id, engine=dead, run="1")
    runtime.put("b", root=places.root_id, engine=dead, run="2")

    removed = await sweep(places, runtime)

    assert {container.id for container in removed} == {"a", "b"}
    assert runtime.containers == {}
    pass_time(places, 15)
    assert await sweep(places, runtime) == []
    assert places.engines.names() == []


async def test_a_container_that_comes_late_is_removed(places: Places) -> None:
    """One that was being made when its engine died is found by a later sweep."""
    runtime = Shelf()
    dead = dead_engine(places)
    pass_time(places, 1_000_000)
    assert await sweep(places, runtime) == []
    pass_time(places, 10)
    assert await sweep(places, runtime) == []
    assert places.engines.names() == [dead]
    runtime.put("late", root=places.root_id, engine=dead)

    pass_time(places, 10)
    assert len(await sweep(places, runtime)) == 1
    assert places.engines.names() == []


async def test_a_clock_that_was_set_back_keeps_no_file(places: Places) -> None:
    """A death in the future was long enough ago."""
    dead_engine(places)
    await sweep(places, Shelf())
    pass_time(places, -1_000_000)
    await sweep(places, Shelf())

    assert places.engines.names() == []


async def test_a_file_that_cannot_be_marked_is_kept(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk does not keep a sweep from what it is for."""
    runtime = Shelf()
    dead = dead_engine(places)
    runtime.put("a", root=places.root_id, engine=dead)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        await sweep(places, runtime)
        pass_time(places, 1000)

    assert runtime.containers == {}
    assert places.engines.names() == [dead]


async def test_a_live_engine_s_are_left_alone(places: Places) -> None:
    """An engine that holds its file lives, here or in another process."""
    runtime = Shelf()
    alive = EngineFile(places.engines, "docker")
    runtime.put("a", root=places.root_id, engine=alive.engine_id, run="1")

    assert await sweep(places, runtime) == []
    assert places.engines.names() == [alive.engine_id]
    alive.release(clean=True)
    assert places.engines.names() == []
    assert await sweep(places, runtime) == []
    assert runtime.containers.keys() == {"a"}


async def test_another_root_s_are_left_alone(places: Places) -> None:
    """Neither another root's nor anybody's container is ours, whatever it claims."""
    runtime = Shelf()
    dead = dead_engine(places)
    runtime.put("other root", root="f" * 32, engine=dead, run="1")
    runtime.put("no root", engine=dead)
    runtime.put("no engine", root=places.root_id)
    runtime.put("unknown engine", root=places.root_id, engine="e" * 32)
    runtime.put("foreign")

    assert await sweep(places, runtime) == []
    assert len(runtime.containers) == 5


async def test_another_runtime_s_are_left_for_its_own_sweep(places: Places) -> None:
    """The file of an engine that used podman is there for podman's sweep."""
    dead = dead_engine(places, "podman")
    docker, podman = Shelf("docker"), Shelf("podman")
    podman.put("a", root=places.root_id, engine=dead, run="1")

    assert await sweep(places, docker) == []
    assert places.engines.names() == [dead]
    assert len(await sweep(places, podman)) == 1
    pass_time(places, 15)
    assert await sweep(places, docker) == []
    assert places.engines.names() == [dead]
    assert await sweep(places, podman) == []
    assert places.engines.names() == []


async def test_what_cannot_be_removed_is_tried_again(places: Places) -> None:
    """A sweep that failed does the rest, and keeps the file for the next one."""
    runtime = Shelf()
    dead, other = dead_engine(places), dead_engine(places)
    runtime.put("a", root=places.root_id, engine=dead, run="1")
    runtime.put("b", root=places.root_id, engine=other, run="2")
    runtime.stuck = {"a"}

    with pytest.raises(RuntimeUnavailableError):
        await sweep(places, runtime)
    assert list(runtime.containers) == ["a"]
    pass_time(places, 15)
    with pytest.raises(RuntimeUnavailableError):
        await sweep(places, runtime)
    assert places.engines.names() == [dead]
    runtime.stuck = set()

    assert len(await sweep(places, runtime)) == 1
    assert places.engines.names() == []


async def test_a_dead_engine_s_network_is_removed(places: Places) -> None:
    """A live one's is not; where it cannot be removed, a later sweep tries again."""
    runtime = Shelf()
    dead = dead_engine(places)
    alive = EngineFile(places.engines, "docker")
    pass_time(places, 15)
    runtime.stuck = {"network"}
    for _ in range(2):
        with pytest.raises(RuntimeUnavailableError, match="in use"):
            await sweep(places, runtime)
        pass_time(places, 15)
    runtime.stuck = set()

    await sweep(places, runtime)

    assert runtime.networks == [dead]
    assert places.engines.names() == [alive.engine_id]
    alive.release(clean=True)


async def test_a_dead_engine_s_sockets_are_thrown_away(places: Places) -> None:
    """Nobody listens there any more; a live engine's stay."""
    dead = dead_engine(places)
    alive = EngineFile(places.engines, "docker")
    for name in (f"{dead}-1", f"{dead}-2", f"{alive.engine_id}-3"):
        places.sockets.subdirectory(name).close()

    await sweep(places, Shelf())

    assert places.sockets.names() == [f"{alive.engine_id}-3"]
    assert len(places.trash.names()) == 2
    alive.release(clean=True)


@pytest.mark.parametrize(("slowness", "method"), [(16.0, "find"), (14.0, None)])
async def test_a_runtime_that_hangs_is_unavailable(
    autojump_clock: MockClock, places: Places, slowness: float, method: str | None
) -> None:
    """Each call may take command_timeout; an engine does not hang while it opens."""
    runtime = Shelf()
    runtime.slowness = slowness
    runtime.put("a", root=places.root_id, engine=dead_engine(places), run="1")
    with trio.fail_after(100):
        if method is None:
            assert len(await sweep(places, runtime)) == 1
            return
        with pytest.raises(RuntimeUnavailableError, match="within 15 s"):
            await sweep(places, runtime)

    assert trio.current_time() == 15


async def test_a_removal_that_hangs_is_given_up(
    autojump_clock: MockClock, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the dead engine stays for another try."""
    runtime = Shelf()
    dead = dead_engine(places)
    runtime.put("a", root=places.root_id, engine=dead, run="1")

    async def hang(_: str) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(runtime, "remove", hang)
    with trio.fail_after(100), pytest.raises(RuntimeUnavailableError):
        await sweep(places, runtime)

    assert places.engines.names() == [dead]


async def test_of_two_sweeps_one_does_the_work(places: Places) -> None:
    """While one sweep has taken over a dead engine, another leaves it alone."""
    dead = dead_engine(places)
    runtime = Shelf()
    runtime.put("a", root=places.root_id, engine=dead, run="1")
    with places.engines.lock(dead):
        assert await sweep(places, runtime) == []

    assert len(await sweep(places, runtime)) == 1


def test_an_engine_file_says_which_runtime(places: Places) -> None:
    """Each engine has an id of its own, and its file says what it uses."""
    engines = [EngineFile(places.engines, "docker") for _ in range(2)]
    ids = {engine.engine_id for engine in engines}

    assert len(ids) == 2
    assert set(places.engines.names()) == ids
    assert {places.engines.read(engine_id) for engine_id in ids} == {b"docker"}
    for engine in engines:
        engine.release(clean=True)


def test_an_engine_that_left_something_leaves_its_file(places: Places) -> None:
    """Unless it left nothing, an engine's file stays for the next sweep."""
    engine = EngineFile(places.engines, "docker")
    with pytest.raises(BlockingIOError), places.engines.lock(engine.engine_id):
        pass
    engine.release(clean=False)
    with places.engines.lock(engine.engine_id):
        pass

    assert places.engines.names() == [engine.engine_id]


async def test_an_engine_that_was_killed_is_dead(
    places: Places, tmp_path: Path
) -> None:
    """SIGKILL of the host is all it takes for a sweep to find what is left."""
    code = (
        "import sys; from clawtrio._hostfs import Directory\n"
        "from clawtrio._sweep import EngineFile\n"
        "with Directory.at(sys.argv[1]) as engines:\n"
        "    engine = EngineFile(engines, 'docker')\n"
        "    print(engine.engine_id, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    runtime = Shelf()
    with subprocess.Popen(  # noqa: ASYNC220 - it is there at once
        [sys.executable, "-c", code, tmp_path / "data" / "engines"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as host:
        assert host.stdout is not None
        engine_id = host.stdout.readline().strip()
        runtime.put("a", root=places.root_id, engine=engine_id, run="1")
        assert await sweep(places, runtime) == []
        host.kill()

    assert len(await sweep(places, runtime)) == 1


async def test_an_engine_that_is_just_starting_is_alive(places: Places) -> None:
    """A file that is not yet in its place belongs to somebody."""
    runtime = Shelf()
    with places.engines.lock(".starting.tmp") as fd:
        os.write(fd, b"docker")
        assert await sweep(places, runtime) == []
        assert places.engines.names() == [".starting.tmp"]
    runtime.put("a", root=places.root_id, engine=".starting.tmp")

    assert await sweep(places, runtime) != []


@pytest.mark.parametrize("method", ["names", "read"])
async def test_an_engine_s_file_may_go_during_a_sweep(
    places: Places, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """An engine that leaves in order while a sweep looks is no error."""
    engine = EngineFile(places.engines, "docker")
    look = getattr(Directory, method)

    def late(self: Directory, *args: str) -> object:
        found = look(self, *args)
        engine.release(clean=True)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Directory, method, late)
        assert await sweep(places, Shelf()) == []

    assert places.engines.names() == []


async def test_a_name_in_the_log_stays_on_its_line(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """A runtime's identifier is text of somebody else's."""
    runtime = Shelf()
    runtime.put("a\nFORGED", root=places.root_id, engine=dead_engine(places))

    await sweep(places, runtime)

    (record,) = caplog.records
    assert "\n" not in record.getMessage()
