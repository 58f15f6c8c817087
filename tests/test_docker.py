"""How the clients of Docker and Podman are called, and how mounts are compared."""

from __future__ import annotations

import csv
import os
import re
import resource
from pathlib import Path

import attrs
import pytest

from clawtrio._docker import DockerContainer, DockerRuntime, _compare_mounts
from clawtrio._errors import NotStartedError, UnsafePathError
from clawtrio._flavours import DOCKER, PODMAN, Flavour
from clawtrio._models import VolumeMount
from clawtrio._process import CLIENT_ENVIRONMENT
from clawtrio._runtimes import (
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    ContainerSpec,
    HeldMount,
    Runtime,
)

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

both = pytest.mark.parametrize("flavour", [DOCKER, PODMAN], ids=lambda f: f.name)


def mount(source: str, target: str = "/x", *, readonly: bool = False) -> HeldMount:
    return HeldMount(VolumeMount(source, target, readonly), -1, 0, 0)


def options(argv: list[str], name: str) -> list[str]:
    """Return the values of an option."""
    return [argv[i + 1] for i, word in enumerate(argv) if word == name]


@both
def test_is_a_runtime(flavour: Flavour) -> None:
    """It is what the engine takes for one."""
    runtime: Runtime = DockerRuntime(flavour, image="x")

    assert runtime.name == flavour.name
    assert not runtime.in_process
    assert runtime.takes_runner


def test_docker_argv() -> None:
    """The whole command, as Docker gets it."""
    spec = attrs.evolve(
        SPEC, mounts=(mount("/a,b", readonly=True), mount('/c"d', "/y"))
    )
    files = options(DockerRuntime(DOCKER, image="image:1").argv(spec), "--ulimit")[1]

    argv = DockerRuntime(DOCKER, image="image:1").argv(spec)

    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY")
    silenced = [*proxies, *(name.lower() for name in proxies)]
    assert argv == [
        *("docker", "run", "-i", "--rm", "--init", "--name", "clawtrio-main-1"),
        *("--label", "clawtrio.root=r", "--label", "clawtrio.run=1"),
        *("--user", "1000:1001", "--cap-drop", "ALL"),
        *("--security-opt", "no-new-privileges", "--ipc", "private"),
        *("--memory", "2147483648", "--memory-swap", "2147483648", "--cpus", "1.5"),
        *("--pids-limit", "512", "--ulimit", "core=0:0", "--ulimit", files),
        *("--log-driver", "none", "--network", "none", "--pull", "never"),
        *("--stop-signal", "SIGTERM", "--workdir", "/workspace/group"),
        *("--no-healthcheck", "--read-only", "--tmpfs"),
        "/tmp:rw,nosuid,nodev,exec,size=1073741824,mode=1777",
        "--tmpfs",
        "/home/node:rw,nosuid,nodev,exec,size=1073741824,mode=0700,uid=1000,gid=1001",
        *(word for name in silenced for word in ("-e", f"{name}=")),
        *("-e", "HOME=/home/node", "-e", "EMPTY="),
        "--mount",
        'type=bind,"source=/a,b",target=/x,bind-nonrecursive=true,readonly',
        *("--mount", 'type=bind,"source=/c""d",target=/y,bind-nonrecursive=true'),
        *("--entrypoint", "python3", "image:1", "/app/src", "echo", "--x"),
    ]


def test_podman_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Podman gets instead, and what it gets in addition from an ordinary user."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    docker = DockerRuntime(DOCKER, image="x").argv(SPEC)
    podman = DockerRuntime(PODMAN, image="x").argv(SPEC)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    rootless = DockerRuntime(PODMAN, image="x").argv(SPEC)

    assert set(podman) - set(docker) == {
        "podman",
        "--http-proxy=false",
        "--read-only-tmpfs=false",
        "--detach-keys=",
        "/tmp:rw,nosuid,nodev,exec,notmpcopyup,size=1073741824,mode=1777",
        "/home/node:rw,nosuid,nodev,exec,notmpcopyup,size=1073741824,mode=0700,U",
    }
    assert options(podman, "-e") == ["HOME=/home/node", "EMPTY="]
    assert [word for word in rootless if word not in podman] == ["--userns=keep-id"]
    assert DockerRuntime(DOCKER, image="x").argv(SPEC) == docker


@both
def test_foreign_image_argv(flavour: Flavour) -> None:
    """It is run as it is; with our entry only if there is something to tell it."""
    runtime = DockerRuntime(flavour, image="foreign")
    runtime.takes_runner = False

    bare = runtime.argv(attrs.evolve(SPEC, arguments=()))
    told = runtime.argv(SPEC)

    for argv in (bare, told):
        assert not {"--read-only", "--tmpfs"} & set(argv)
    assert bare[-1] == "foreign"
    assert "--entrypoint" not in bare
    assert told[len(bare) - 1 :] == [
        *("--entrypoint", "python3", "foreign", "/app/src", "echo", "--x"),
    ]


def test_open_network_argv() -> None:
    """An engine's network with Docker, a run's own with Podman; never the default."""
    labels = {LABEL_ROOT: "r", LABEL_ENGINE: "e", LABEL_RUN: "1"}
    spec = attrs.evolve(SPEC, labels=labels, network="open")
    others = [
        attrs.evolve(spec, labels={**labels, name: "another"})
        for name in (LABEL_RUN, LABEL_ENGINE, LABEL_ROOT)
    ]

    for flavour, distinct in ((DOCKER, 3), (PODMAN, 4)):
        runtime = DockerRuntime(flavour, image="x")
        networks = [options(runtime.argv(s), "--network")[0] for s in (spec, *others)]
        assert len(set(networks)) == distinct
        assert all(re.fullmatch(r"ct-[0-9a-f]{12}", name) for name in networks)


@both
@pytest.mark.parametrize(
    "name", ["ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "CLAWTRIO_X", "MY_TOKEN"]
)
def test_hidden_values(flavour: Flavour, name: str) -> None:
    """What is hidden goes by name, its value to nobody who reads along."""
    environment = {"SHOWN": "1", name: "secret", "HTTP_PROXY": "x"}
    hidden = frozenset({name, "ABSENT_KEY"})
    spec = attrs.evolve(SPEC, environment=environment, hidden=hidden)

    argv = DockerRuntime(flavour, image="x").argv(spec)

    given = options(argv, "-e")
    assert {"SHOWN=1", name} < set(given)
    assert "ABSENT_KEY" not in given
    assert "secret" not in f"{argv} {spec!r}"


@both
@pytest.mark.parametrize(
    "name",
    [
        *sorted(CLIENT_ENVIRONMENT),
        *("DOCKER_AUTH_TOKEN", "CONTAINER_TLS_KEY", "CONTAINERS_X_SECRET", "OTEL_KEY"),
        *("HTTP_PROXY", "https_proxy", "LD_PRELOAD", "GODEBUG", "_CONTAINERS_TOKEN"),
        *("NOTIFY_SOCKET", "CLAUDE_X=Y", "TZ"),
    ],
)
def test_names_that_cannot_be_hidden(flavour: Flavour, name: str) -> None:
    """What a client might obey is not put into its environment for an agent."""
    spec = attrs.evolve(SPEC, environment={name: "x"}, hidden=frozenset({name}))

    with pytest.raises(NotStartedError, match=name):
        DockerRuntime(flavour, image="x").argv(spec)


@pytest.mark.parametrize("name", ["a,b", '"', 'a","b', "a:b", " a ", "a=b", "'", "é"])
def test_mount_names(name: str) -> None:
    """Whatever is in a path, it is one field of the option."""
    spec = attrs.evolve(SPEC, mounts=(mount(f"/{name}", f"/t/{name}"),))

    (option,) = options(DockerRuntime(DOCKER, image="x").argv(spec), "--mount")

    assert next(csv.reader([option])) == [
        "type=bind",
        f"source=/{name}",
        f"target=/t/{name}",
        "bind-nonrecursive=true",
    ]


@both
@pytest.mark.parametrize(
    "path", ["/a\nb", "/a\r", "/\x7f", "/\x85", "/\x00", "/\udcff"]
)
def test_misread_paths(flavour: Flavour, path: str) -> None:
    """Paths that the runtimes misread are refused, outside as inside."""
    runtime = DockerRuntime(flavour, image="x")
    for held in (mount(path), mount("/x", path)):
        with pytest.raises(UnsafePathError) as caught:
            runtime.argv(attrs.evolve(SPEC, mounts=(held,)))
        assert caught.value.path == path


@pytest.mark.parametrize(
    ("hard", "expected"), [(1024, 1024), (resource.RLIM_INFINITY, 16384)]
)
def test_open_files(hard: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more open files are asked for than we may have."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))

    argv = DockerRuntime(PODMAN, image="x").argv(SPEC)

    assert options(argv, "--ulimit") == ["core=0:0", f"nofile={expected}:{expected}"]


def test_unreadable_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that may not be reached is left out; the others are still compared."""
    # Of our own process, any mount's root will do for the id.
    line = Path("/proc/self/mountinfo").read_text().splitlines()[0]
    root = line.split()[3]
    status = tmp_path.stat()
    good = HeldMount(
        VolumeMount("/good", str(tmp_path), readonly=True),
        -1,
        status.st_dev,
        status.st_ino,
    )
    really_open = os.open

    def refuse(name: str, flags: int, *, dir_fd: int | None = None) -> int:
        if name == "forbidden":
            raise PermissionError(13, "Permission denied")
        return really_open(name, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    mounts = [mount("/bad", "/forbidden"), good]
    before = len([*Path("/proc/self/fd").iterdir()])

    replaced, why = _compare_mounts(root, os.getpid(), mounts)
    assert (replaced, why) == (None, "[Errno 13] Permission denied")
    wrong = attrs.evolve(good, inode=good.inode + 1)
    replaced, _ = _compare_mounts(root, os.getpid(), [*mounts, wrong])
    assert replaced == wrong
    assert len([*Path("/proc/self/fd").iterdir()]) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="owns nothing that it may not read")
def test_unreadable_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not be looked into is no error."""
    replaced, why = _compare_mounts("0" * 64, 2**22 + 1, [mount("/x")])

    assert replaced is None
    assert "No such file" in why


def test_a_process_of_another_host_is_nobody_s() -> None:
    """An id that names no process of the container here is not told."""
    container = DockerContainer.__new__(DockerContainer)
    container._seen = None
    assert container.process is None

    for process in (os.getpid(), 2**22 - 1):
        container._seen = ("0" * 64, process)
        assert container.process is None
