"""What clients may answer, told by fake ones: no engine is asked."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import attrs
import pytest
import trio

from clawtrio._docker import DockerRuntime
from clawtrio._errors import NotStartedError, RuntimeUnavailableError
from clawtrio._flavours import DOCKER, PODMAN, Flavour
from clawtrio._models import VolumeMount
from clawtrio._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    ContainerSpec,
    FoundContainer,
    HeldMount,
)

from .conftest import Fake

SPEC = ContainerSpec(
    name="clawtrio-main-1",
    labels={LABEL_ROOT: "r", LABEL_RUN: "1"},
    mounts=(),
    environment={"HOME": "/home/node", "EMPTY": ""},
    arguments=("echo", "--x"),
    uid=1000,
    gid=1001,
    memory=2**31,
    cpus=1.5,
    pids=512,
)
DOCKER_INFO = {
    "NCPU": 2,
    "MemoryLimit": True,
    "PidsLimit": True,
    "SecurityOptions": ["name=apparmor", "name=seccomp,profile=default"],
    "ClientInfo": {"Version": "28.2.2"},
}
PODMAN_INFO = {
    "host": {
        "security": {"seccompEnabled": True},
        "cgroupControllers": ["cpu", "memory", "pids"],
    }
}
INFO = {"docker": DOCKER_INFO, "podman": PODMAN_INFO}


both = pytest.mark.parametrize("flavour", [DOCKER, PODMAN], ids=lambda f: f.name)


def mount(source: str, target: str = "/x", *, readonly: bool = False) -> HeldMount:
    return HeldMount(VolumeMount(source, target, readonly), -1, 0, 0)


def options(argv: list[str], name: str) -> list[str]:
    """Return the values of an option."""
    return [argv[i + 1] for i, word in enumerate(argv) if word == name]


@both
async def test_check_learns(flavour: Flavour, fake: Fake) -> None:
    """What the engine and the image are like shows in the next command."""
    runtime = DockerRuntime(flavour, image="x")
    info = json.dumps(INFO[flavour.name])
    spec = attrs.evolve(SPEC, cpus=64, mounts=(mount("/a"),))
    image = (
        {"labels": "null", "expected": False},
        {
            "labels": '{"clawtrio.protocol": "1"}',
            "expected": True,
        },
    )
    for each in image:
        fake(flavour.name, info=(0, info, ""), image=(0, str(each["labels"]), ""))
        await runtime.check()
        assert runtime.takes_runner is each["expected"]

    argv = runtime.argv(spec)
    docker = flavour is DOCKER
    assert options(argv, "--cpus") == ["2" if docker else "64"]
    word = "bind-recursive=disabled" if docker else "bind-nonrecursive=true"
    assert options(argv, "--mount") == [f"type=bind,source=/a,target=/x,{word}"]


@pytest.mark.parametrize(
    ("client", "word"),
    [
        ({}, "bind-nonrecursive=true"),
        ({"Version": "24.0.9"}, "bind-nonrecursive=true"),
        ({"Version": "25.0.0"}, "bind-recursive=disabled"),
        ({"Version": "30.1"}, "bind-recursive=disabled"),
    ],
)
async def test_docker_clients(fake: Fake, client: dict[str, str], word: str) -> None:
    """Each client is told in the word that it knows and does not complain of."""
    info = json.dumps({**DOCKER_INFO, "NCPU": 0, "ClientInfo": client})
    fake("docker", info=(0, info, ""), image=(0, "{}", ""))
    runtime = DockerRuntime(DOCKER, image="x")
    await runtime.check()

    argv = runtime.argv(attrs.evolve(SPEC, cpus=64, mounts=(mount("/a"),)))

    assert options(argv, "--mount") == [f"type=bind,source=/a,target=/x,{word}"]
    assert options(argv, "--cpus") == ["64"]


async def test_selinux_labels(fake: Fake) -> None:
    """Podman labels what is the bot's own; with Docker, the operator has to."""
    info = {
        "docker": {**DOCKER_INFO, "SecurityOptions": ["name=seccomp", "name=selinux"]},
        "podman": json.loads(json.dumps(INFO["podman"])),
    }
    info["podman"]["host"]["security"]["selinuxEnabled"] = True
    own = attrs.evolve(mount("/own"), relabel=True)
    spec = attrs.evolve(SPEC, mounts=(own, mount("/foreign")))
    shown = {}
    for flavour in (DOCKER, PODMAN):
        name = flavour.name
        fake(name, info=(0, json.dumps(info[name]), ""), image=(0, "{}", ""))
        runtime = DockerRuntime(flavour, image="x")
        assert not runtime.needs_labels
        await runtime.check()
        assert runtime.needs_labels is (flavour is DOCKER)
        shown[name] = ["relabel" in o for o in options(runtime.argv(spec), "--mount")]

    assert shown == {"docker": [False, False], "podman": [True, False]}


@pytest.mark.parametrize(
    ("flavour", "changes", "endpoint", "expected"),
    [
        (DOCKER, {}, "unix:///var/run/docker.sock", True),
        (DOCKER, {}, "tcp://elsewhere:2376", False),
        (DOCKER, {}, "ssh://elsewhere", False),
        (DOCKER, {"OperatingSystem": "Docker Desktop"}, "unix:///x", False),
        (PODMAN, {"serviceIsRemote": False}, "", True),
        (PODMAN, {"serviceIsRemote": True}, "", False),
    ],
)
async def test_where_the_engine_is(
    fake: Fake,
    flavour: Flavour,
    changes: dict[str, object],
    endpoint: str,
    *,
    expected: bool,
) -> None:
    """Mounts can be compared only where containers are processes of this host."""
    info = json.loads(json.dumps(INFO[flavour.name]))
    (info if flavour is DOCKER else info["host"]).update(changes)
    answers = {"info": (0, json.dumps(info), ""), "image": (0, "{}", "")}
    fake(flavour.name, context=(0, endpoint, ""), **answers)
    runtime = DockerRuntime(flavour, image="x")

    await runtime.check()

    assert runtime.compares_mounts is expected


@pytest.mark.parametrize("backend", ["cni", None])
async def test_networks_that_are_not_apart(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    """A Podman whose networks cannot be kept apart has no open one to give."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    info = json.loads(json.dumps(INFO["podman"]))
    info["host"]["networkBackend"] = backend
    fake("podman", info=(0, json.dumps(info), ""), image=(0, "{}", ""))
    runtime = DockerRuntime(PODMAN, image="x")
    await runtime.check()

    with pytest.raises(RuntimeUnavailableError, match="apart") as caught:
        await runtime.open_network({"clawtrio.root": "r", "clawtrio.engine": "e"})

    assert "netavark" in caught.value.remedy


async def trouble(flavour: Flavour) -> RuntimeUnavailableError:
    with pytest.raises(RuntimeUnavailableError) as caught:
        await DockerRuntime(flavour, image="agent:1").check()
    assert caught.value.runtime == flavour.name
    return caught.value


@both
async def test_no_client(flavour: Flavour, fake: Fake) -> None:
    """A client that is not there is to be installed."""
    error = await trouble(flavour)

    assert error.problem == f"cannot run '{flavour.name}': No such file or directory"
    assert error.remedy == flavour.install


DOWN = "Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?"


@pytest.mark.parametrize(
    ("answer", "problem", "remedy"),
    [
        ((1, "{}", f"{DOWN}\n"), DOWN, DOCKER.start),
        (
            (0, json.dumps({"ServerErrors": [DOWN]}, separators=(",", ":")), ""),
            DOWN,
            "",
        ),
        ((1, "", "permission denied while trying\n"), None, DOCKER.denied),
        ((1, "", "\n"), "it failed with code 1", DOCKER.start),
        ((1, "", "x\n\nRun 'docker info --help' for more\n"), "x", DOCKER.start),
        ((1, "", "Error response from daemon: a\x1b[2J.\n"), "a\\x1b[2J", ""),
    ],
)
async def test_engine_does_not_answer(
    fake: Fake, answer: tuple[int, str, str], problem: str | None, remedy: str
) -> None:
    """An engine that is down is to be started; one that is closed, to be opened."""
    fake("docker", info=answer)

    error = await trouble(DOCKER)

    if problem is not None:
        assert error.problem == problem
    assert error.remedy == (remedy or DOCKER.start)


@pytest.mark.parametrize(
    ("flavour", "info"),
    [
        (DOCKER, {**DOCKER_INFO, "SecurityOptions": None}),
        (DOCKER, {**DOCKER_INFO, "SecurityOptions": ["name=apparmor"]}),
        (
            DOCKER,
            {**DOCKER_INFO, "SecurityOptions": ["name=seccomp,profile=unconfined"]},
        ),
        (
            PODMAN,
            {"host": {**PODMAN_INFO["host"], "security": {"seccompEnabled": False}}},
        ),
    ],
)
async def test_seccomp_off(fake: Fake, flavour: Flavour, info: object) -> None:
    """Without a seccomp filter nothing is run."""
    fake(flavour.name, info=(0, json.dumps(info), ""))

    assert "seccomp" in (await trouble(flavour)).problem


@pytest.mark.parametrize(
    ("flavour", "info"),
    [
        (DOCKER, {**DOCKER_INFO, "MemoryLimit": False}),
        (DOCKER, {**DOCKER_INFO, "PidsLimit": False}),
        (PODMAN, {"host": {**PODMAN_INFO["host"], "cgroupControllers": []}}),
        (PODMAN, {"host": {**PODMAN_INFO["host"], "cgroupControllers": None}}),
    ],
)
async def test_limits_off(
    fake: Fake, flavour: Flavour, info: object, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that cannot limit anything is accepted, with one warning."""
    fake(flavour.name, info=(0, json.dumps(info), ""), image=(0, "null", ""))

    await DockerRuntime(flavour, image="x").check()

    assert [record.getMessage() for record in caplog.records] == [
        f"{flavour.name}: containers' memory and processes are not limited"
    ]


@pytest.mark.parametrize("info", ["", "[]", "null", "{}", json.dumps(PODMAN_INFO)])
async def test_answers_of_something_else(fake: Fake, info: str) -> None:
    """What is called docker may be another program."""
    fake("docker", info=(0, info, ""))

    error = await trouble(DOCKER)

    assert error.problem == "what 'docker info' answers is not understood"
    assert "podman" in error.remedy


@both
@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((1, "[]\n", "No such image: agent:1"), "there is no image 'agent:1'"),
        ((125, "", "Error: agent:1: image not known"), "there is no image 'agent:1'"),
        ((1, "", "Error: database is locked"), "database is locked"),
        ((0, "[", ""), "is not understood"),
        ((0, "[1]", ""), "is not understood"),
        ((0, '{"clawtrio.protocol": "2"}', ""), "has protocol '2', not '1'"),
    ],
)
async def test_image_is_not_right(
    fake: Fake, flavour: Flavour, answer: tuple[int, str, str], problem: str
) -> None:
    """An image that is absent, or speaks otherwise, is to be built."""
    fake(flavour.name, info=(0, json.dumps(INFO[flavour.name]), ""), image=answer)

    error = await trouble(flavour)

    assert problem in error.problem
    if "image 'agent:1'" in error.problem:
        assert error.remedy == (
            f"Build it: clawtrio image build --runtime {flavour.name}"
        )


@both
@pytest.mark.parametrize("agent", ['"other"', "null"])
async def test_image_without_the_agent(
    fake: Fake, flavour: Flavour, agent: str
) -> None:
    """An image of ours without the agent is to be built anew; foreign ones are not."""
    info = (0, json.dumps(INFO[flavour.name]), "")
    runtime = DockerRuntime(flavour, image="agent:1", agent="claude")
    labels = f'{{"clawtrio.protocol": "1", "clawtrio.agent": {agent}}}'
    fake(flavour.name, info=info, image=(0, labels, ""))
    with pytest.raises(RuntimeUnavailableError) as caught:
        await runtime.check()
    assert caught.value.problem == "image 'agent:1' is without the agent 'claude'"
    assert caught.value.remedy.startswith("Build it: clawtrio image build")

    # For another agent, it will do.
    await DockerRuntime(flavour, image="agent:1").check()
    for labels in ('{"clawtrio.protocol": "1", "clawtrio.agent": "claude"}', "null"):
        fake(flavour.name, info=info, image=(0, labels, ""))
        await runtime.check()


@both
async def test_find_parses(fake: Fake, flavour: Flavour) -> None:
    """Labels without a value are absent ones; what does not fit is left out."""
    lines = ['["id1","e","r","1","v"]', '["id2","","r","","v"]', '["id3","","s","",""]']
    fake(flavour.name, ps=(0, "\n".join(lines) + "\n", "a warning"))

    found = await DockerRuntime(flavour, image="x").find({LABEL_ROOT: "r", "z.z": "v"})

    assert found == [
        FoundContainer(
            "id1", {LABEL_ENGINE: "e", LABEL_ROOT: "r", LABEL_RUN: "1", "z.z": "v"}
        ),
        FoundContainer("id2", {LABEL_ROOT: "r", "z.z": "v"}),
    ]


@both
@pytest.mark.parametrize("answer", ["x", "[1]", "[]", "3", '["id","e","r","1","x"]\n['])
async def test_find_does_not_guess(fake: Fake, flavour: Flavour, answer: str) -> None:
    """An answer that is not understood is not taken for none."""
    fake(flavour.name, ps=(0, answer, ""))

    with pytest.raises(RuntimeUnavailableError, match="ps' answers is not understood"):
        await DockerRuntime(flavour, image="x").find({LABEL_ROOT: "r"})


@both
async def test_find_and_remove_fail(fake: Fake, flavour: Flavour) -> None:
    """What fails says so in the client's own last line."""
    fake(flavour.name, ps=(1, "", "a\nb\n"), rm=(1, "", "Error: c\n"))
    runtime = DockerRuntime(flavour, image="x")

    for call, problem in ((runtime.find({}), "b"), (runtime.remove("x"), "c")):
        with pytest.raises(RuntimeUnavailableError) as caught:
            await call
        assert caught.value.problem == problem


GONE = [
    "Error response from daemon: No such container: x",
    'Error: no container with name or ID "x" found: no such container',
    "Error response from daemon: Cannot kill container: x: Container 1 is not running",
    "Error: can only kill running containers. 1 is in state exited",
    "Error response from daemon: removal of container x is already in progress",
]


@both
@pytest.mark.parametrize("message", GONE)
async def test_gone_is_no_error(
    fake: Fake, flavour: Flavour, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However a client says that there is no container any more, all is well."""
    no = (1, "", message)
    fake(flavour.name, rm=no, stop=no, kill=no, run=(0, "", ""))
    runtime = DockerRuntime(flavour, image="x")

    await runtime.remove("x")
    container = await runtime.start(SPEC)
    await container.stop(1)
    await container.kill()
    await container.wait()
    await container.aclose()

    assert caplog.records == []


async def test_failed_orders_are_warnings(
    fake: Fake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order that fails raises nothing: the engine looks what became of it."""
    caplog.set_level(logging.INFO)
    fake("docker", run=(0, "", ""), stop=(1, "", "no\nway\n"))
    container = await DockerRuntime(DOCKER, image="x").start(SPEC)
    await container.stop(0.2)
    monkeypatch.setenv("PATH", "/nonexistent")
    await container.kill()
    await container.wait()
    await container.aclose()

    assert [record.getMessage() for record in caplog.records] == [
        "clawtrio-main-1: stop failed: way",
        "clawtrio-main-1: kill failed: cannot run 'docker': No such file or directory",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


async def test_start_without_a_client(fake: Fake) -> None:
    """There is no container without a client."""
    with pytest.raises(NotStartedError):
        await DockerRuntime(DOCKER, image="x").start(SPEC)


TINI = "[WARN  tini (6)] x\n[FATAL tini (7)] exec python3 failed: No such file"


@pytest.mark.parametrize(
    ("code", "stderr", "expected"),
    [
        (
            125,
            "WARNING: x\ndocker: Error response from daemon: no space.\n\nRun 'docker",
            "no space",
        ),
        (125, "Error: statfs /nope: no such file\n", "statfs /nope: no such file"),
        (126, "Error: runc: permission denied: OCI permission denied", None),
        (127, "crun: executable file `x` not found\n", "executable file `x` not found"),
        (
            125,
            "unknown flag: --x\n\nUsage: x\n\nRun 'docker run --help'\n",
            "unknown f",
        ),
        (125, "", None),
        (125, "sh: 1: exit\n", None),
        (1, "Error: mine\n", None),
        (0, "docker: x\n", None),
        (0, TINI, None),
        (2, TINI, None),
        (137, TINI, None),
        (126, "[FATAL tini (7)] exec x", "exec x"),
        (127, TINI, "exec python3 failed: No such file"),
        (1, "ERROR (catatonit:6): failed to exec pid1: No", "failed to exec pid1: No"),
    ],
)
async def test_start_failure(
    fake: Fake, code: int, stderr: str, expected: str | None
) -> None:
    """The runtime's own words are told from the agent's."""
    fake("docker", run=(0, "", ""))
    container = await DockerRuntime(DOCKER, image="x").start(SPEC)
    await container.wait()
    await container.aclose()

    failure = container.start_failure(code, stderr)

    if stderr.startswith("Error: runc"):
        assert failure == "runc: permission denied: OCI permission denied"
    elif expected == "unknown f":
        assert failure == "unknown flag: --x"
    else:
        assert failure == expected


async def run_fake(fake: Fake, inspect: str, *mounts: HeldMount) -> None:
    fake("docker", run=(0, "", ""), container=(0, inspect, ""))
    client = Path(os.environ["PATH"]) / "docker"
    text = client.read_text().replace("run) ", "run) read x; ")
    client.write_text(text)
    spec = attrs.evolve(SPEC, mounts=mounts)
    with trio.fail_after(10):
        container = await DockerRuntime(DOCKER, image="x").start(spec)
        try:
            await container.verify()
        finally:
            with trio.CancelScope(shield=True):
                await container.stdin.aclose()
                await container.wait()
                await container.aclose()


async def test_engine_elsewhere(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    """Process numbers of another host prove nothing: a line for those who debug."""
    caplog.set_level(logging.DEBUG, "clawtrio")
    await run_fake(fake, f"{'0' * 64} {os.getpid()} true\n", mount("/nowhere"))
    await run_fake(fake, f"{'0' * 64} 0 true\n", mount("/nowhere"))

    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "clawtrio-main-1: mounts not compared: its process is not on this host"
    )
    assert "not compared" in second


async def test_threads_are_not_the_applications(fake: Fake) -> None:
    """Mounts are compared though the application uses all of Trio's threads."""
    limiter = trio.to_thread.current_default_thread_limiter()
    limiter.total_tokens = 1
    async with limiter:
        await run_fake(fake, f"{'0' * 64} {os.getpid()} true\n", mount("/nowhere"))


async def test_looking_ends_with_the_client(fake: Fake) -> None:
    """Nobody looks longer than the client lives."""
    fake("docker", run=(0, "", ""), container=(0, "0123456789ab 0 false\n", ""))
    with trio.fail_after(10):
        container = await DockerRuntime(DOCKER, image="x").start(SPEC)
        await container.verify()
        await container.aclose()
    patient = Path(os.environ["PATH"]) / "docker"
    patient.write_text(patient.read_text().replace("run) ", "run) /bin/sleep 0.5; "))
    with trio.fail_after(10):
        container = await DockerRuntime(DOCKER, image="x").start(SPEC)
        await container.verify()
        await container.aclose()

    assert container._seen is None
