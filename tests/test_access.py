"""A run's way to the API, from what its container is given to the API itself."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import clawtrio
from clawtrio import (
    CredentialsError,
    Ending,
    Engine,
    Group,
    NotStartedError,
    RuntimeUnavailableError,
)
from clawtrio._hostfs import Directory
from clawtrio.testing import AgentPipes, FakeRuntime, framed

from .helpers import (
    GROUP,
    JID,
    OwnContainer,
    OwnRuntime,
    engine_on,
    hang,
    nothing,
    open_descriptors,
    raising,
)

SECRET = "sk-ant-the-real-one"
ANSWER = framed(b'{"status":"success","result":"hi"}')


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have none in the environment."""
    for name in ("API_KEY", "AUTH_TOKEN", "BASE_URL"):
        monkeypatch.delenv(f"ANTHROPIC_{name}", raising=False)
    monkeypatch.delenv("CLAUDE_CODE_OAUTH_TOKEN", raising=False)


def credential(root: Path, name: str = "ANTHROPIC_API_KEY") -> None:
    (root / ".env").write_text(
        f"{name}={SECRET}\nANTHROPIC_BASE_URL=http://127.0.0.1:1"
    )


async def answering(pipes: AgentPipes) -> int:
    await pipes.stdout.send_all(ANSWER)
    return 0


async def ask(pipes: AgentPipes, request: bytes) -> bytes:
    """Send the proxy a request by the socket that the container has, as told."""
    spec = pipes.spec
    [mount] = [m for m in spec.mounts if m.mount.container_path == "/run/clawtrio"]
    told = spec.environment["CLAWTRIO_PROXY"].removeprefix("/run/clawtrio/")
    path = f"/proc/self/fd/{mount.fd}/{told}"
    stream = trio.SocketStream(trio.socket.socket(socket.AF_UNIX))
    async with stream:
        await stream.socket.connect(path)
        await stream.send_all(request)
        return b"".join([chunk async for chunk in stream])


def request_with(token: str) -> bytes:
    lines = (
        "POST /v1/messages HTTP/1.1",
        *("Host: 127.0.0.1:3001", f"x-api-key: {token}", "Connection: close"),
        *("Content-Length: 2", "", "{}"),
    )
    return "\r\n".join(lines).encode()


@asynccontextmanager
async def opened(
    root: Path, fake: Any = answering, **changes: Any
) -> AsyncIterator[tuple[Engine, FakeRuntime]]:
    runtime = FakeRuntime(fake)
    async with engine_on(root, runtime, **{"agent": "claude", **changes}) as engine:
        yield engine, runtime


async def test_without_a_credential_nothing_starts(tmp_path: Path) -> None:
    """The error comes before the container, says what to do, and frees the group."""
    async with opened(tmp_path) as (engine, runtime):
        with pytest.raises(CredentialsError, match="ANTHROPIC_API_KEY"):
            await engine.run(GROUP, "hi", chat_jid=JID)
        assert runtime.specs == []
        credential(tmp_path)
        result = await engine.run(GROUP, "hi", chat_jid=JID)

    assert result.ending is Ending.EXITED


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("ANTHROPIC_API_KEY", "ANTHROPIC_API_KEY"),
        ("CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN"),
        ("ANTHROPIC_AUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN"),
    ],
)
async def test_what_the_agent_is_told(tmp_path: Path, variable: str, told: str) -> None:
    """A token of its own in the credential's place, and where the proxy is."""
    credential(tmp_path, variable)

    async with opened(tmp_path) as (engine, runtime):
        for _ in range(2):
            await engine.run(GROUP, "hi", chat_jid=JID)

    tokens = set()
    for spec in runtime.specs:
        assert SECRET not in repr(spec)
        assert spec.environment["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:3001"
        tokens.add(spec.environment[told])
        secrets = {"ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"} - {told}
        assert not secrets & set(spec.environment)
    assert len(tokens) == 2
    assert all(len(token) > 30 for token in tokens)


async def test_the_offline_agent_knows_of_no_api(tmp_path: Path) -> None:
    """It has no token, no socket, and no usage."""
    credential(tmp_path)

    async with opened(tmp_path, agent="echo") as (engine, runtime):
        result = await engine.run(GROUP, "hi", chat_jid=JID)

    [spec] = runtime.specs
    assert not [name for name in spec.environment if "ANTHROPIC" in name]
    assert "/run/clawtrio" not in {m.mount.container_path for m in spec.mounts}
    assert result.usage is None


async def test_the_socket_is_the_run_s_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There its token is good, and no other; the answers are counted."""
    caplog.set_level(logging.DEBUG)
    credential(tmp_path)
    answers: list[bytes] = []
    tokens: list[str] = []

    async def agent(pipes: AgentPipes) -> int:
        token = pipes.spec.environment["ANTHROPIC_API_KEY"]
        # The API itself is not there: whoever gets that far gets a 502.
        requests = map(request_with, (token, *tokens, "wrong"))
        answers.extend([await ask(pipes, request) for request in requests])
        tokens.append(token)
        return await answering(pipes)

    async with opened(tmp_path, agent) as (engine, _):
        first = await engine.run(GROUP, "hi", chat_jid=JID)
        second = await engine.run(Group("O", "other"), "hi", chat_jid=JID)

    statuses = [int(answer.split()[1]) for answer in answers]
    assert statuses == [502, 401, 502, 401, 401]
    assert first.usage is not None
    assert first.usage.statuses == ((401, 1), (502, 1))
    assert second.usage is not None
    assert second.usage.requests == 1
    said = caplog.text
    assert SECRET not in said
    assert not any(token in said for token in tokens)


async def test_budgets(tmp_path: Path) -> None:
    """A run that has used up what it may gets 429."""
    credential(tmp_path)
    answers: list[bytes] = []

    async def agent(pipes: AgentPipes) -> int:
        token = pipes.spec.environment["ANTHROPIC_API_KEY"]
        request = request_with(token)
        answers.extend([await ask(pipes, request) for _ in range(3)])
        return await answering(pipes)

    async with opened(tmp_path, agent, max_requests=2) as (engine, _):
        await engine.run(GROUP, "hi", chat_jid=JID)

    assert [answer.split()[1] for answer in answers] == [b"502", b"502", b"429"]


async def test_a_user_s_own_agent_may_do_without(tmp_path: Path) -> None:
    """It needs no credential; if it asks the proxy all the same, it gets 503."""
    answers: list[bytes] = []

    async def agent(pipes: AgentPipes) -> int:
        token = pipes.spec.environment["ANTHROPIC_API_KEY"]
        answers.append(await ask(pipes, request_with(token)))
        return await answering(pipes)

    async with opened(tmp_path, agent, agent_command=("x",)) as (engine, _):
        result = await engine.run(GROUP, "hi", chat_jid=JID)

    assert result.status == "success"
    assert [answer.split()[1] for answer in answers] == [b"503"]


async def test_after_the_run_nobody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket is gone, its directory and its descriptors, however it ended."""
    credential(tmp_path)
    before = open_descriptors()
    gone = trio.Path(tmp_path, "data", "sockets")

    async def agent(_: AgentPipes) -> None:
        await trio.sleep_forever()

    async with opened(tmp_path, agent) as (engine, runtime):
        async with engine.open_run(GROUP, "hi", chat_jid=JID):
            assert len([entry async for entry in aiter_of(gone)]) == 1
        assert [entry async for entry in aiter_of(gone)] == []

        async def fails(spec: object) -> None:
            await trio.lowlevel.checkpoint()
            raise NotStartedError("no")

        monkeypatch.setattr(runtime, "start", fails)
        with pytest.raises(NotStartedError):
            await engine.run(GROUP, "hi", chat_jid=JID)
        assert [entry async for entry in aiter_of(gone)] == []

    assert open_descriptors() == before


async def aiter_of(path: trio.Path) -> AsyncIterator[trio.Path]:
    for entry in await path.iterdir():
        yield entry


async def test_a_root_with_a_long_name(tmp_path: Path) -> None:
    """An address of a Unix socket is short; the path to it may be long."""
    root = tmp_path / ("r" * 200)
    root.mkdir()
    credential(root)

    async with opened(root) as (engine, _):
        result = await engine.run(GROUP, "hi", chat_jid=JID)

    assert result.status == "success"


async def by_url(container: OwnContainer) -> None:
    """Ask at the URL that the container was told, as an image of somebody's does."""
    told = container.spec.environment
    host, port = told["ANTHROPIC_BASE_URL"].removeprefix("http://").split(":")
    if not await container.agent_stdin.receive_some(1):
        return
    outside = container.ports.get(int(port), int(port))
    async with await trio.open_tcp_stream(host, outside) as stream:
        await stream.send_all(request_with(told["ANTHROPIC_API_KEY"]))
        status = (await stream.receive_some()).split()[1].decode()
    result = json.dumps({"status": "success", "result": f"{status} {host}:{port}"})
    await container.agent_stdout.send_all(framed(result.encode()))
    container.exit(0)


@pytest.mark.parametrize("network", ["proxy", "open"])
@pytest.mark.parametrize("gateway", [True, False])
@pytest.mark.parametrize("root", [True, False])
async def test_an_image_that_knows_only_a_url(
    tmp_path: Path,
    network: str,
    *,
    gateway: bool,
    root: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its port is inside; an ordinary user's may be on the host, in an open network."""
    credential(tmp_path)
    unavailable = RuntimeUnavailableError("own", "it has none", "Do without.")
    runtime = OwnRuntime(by_url, gateway=nothing if gateway else raising(unavailable))

    async with engine_on(tmp_path, runtime, agent="claude", network=network) as engine:
        assert len(runtime.networks) == (network == "open")
        monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
        result = await engine.run(GROUP, "hi", chat_jid=JID)
        monkeypatch.undo()

    assert runtime.networks == []
    assert result.result is not None, result
    status, _, url = result.result.partition(" ")
    # The API is not there.
    assert status == "502"
    outside = network == "open" and gateway and not root
    assert (url != "127.0.0.1:3001") is outside


async def test_a_port_that_cannot_be_opened(tmp_path: Path) -> None:
    """The agent gets no prompt, and the result says what to do."""
    credential(tmp_path)
    unavailable = RuntimeUnavailableError("own", "it cannot be joined", "Be root.")
    runtime = OwnRuntime(by_url, listen=raising(unavailable))

    async with engine_on(tmp_path, runtime, agent="claude") as engine:
        result = await engine.run(GROUP, "hi", chat_jid=JID)

    assert result.ending is Ending.NOT_STARTED
    assert result.error == "own: it cannot be joined. Be root."


async def test_a_socket_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run does not start, and nothing is left of the attempt."""
    credential(tmp_path)
    before = open_descriptors()

    async with opened(tmp_path) as (engine, runtime):

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(socket.socket, "bind", refuse)
        with pytest.raises(NotStartedError, match="Permission denied"):
            await engine.run(GROUP, "hi", chat_jid=JID)

    assert runtime.specs == []
    assert list((tmp_path / "data" / "sockets").iterdir()) == []
    assert open_descriptors() == before


async def test_a_socket_that_cannot_be_removed_is_left_for_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, say, is a warning, and no end of the engine."""
    credential(tmp_path)
    really_discard = Directory.discard

    def discard(directory: Directory, name: str, trash: Directory) -> None:
        if directory.path.endswith("sockets"):
            raise OSError(28, "No space left on device")
        really_discard(directory, name, trash)

    async with opened(tmp_path) as (engine, _):
        with monkeypatch.context() as patch:
            patch.setattr(Directory, "discard", discard)
            result = await engine.run(GROUP, "hi", chat_jid=JID)

    assert result.status == "success"
    assert "No space left on device" in caplog.text
    assert len(list((tmp_path / "data" / "sockets").iterdir())) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.0.0.2", "::1"])
async def test_an_address_that_the_operator_chose(tmp_path: Path, host: str) -> None:
    """This machine's loopback goes by a name in there; any other is told as it is."""
    credential(tmp_path)
    urls: list[str] = []

    async def agent(pipes: AgentPipes) -> int:
        urls.append(pipes.spec.environment["ANTHROPIC_BASE_URL"])
        assert "CLAWTRIO_PROXY" not in pipes.spec.environment
        return await answering(pipes)

    async with opened(tmp_path, agent, network="open", proxy_host=host) as (engine, _):
        await engine.run(GROUP, "hi", chat_jid=JID)

    assert urls[0].startswith("http://host.docker.internal:")


async def test_a_network_that_stays_is_left_for_a_sweep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning, and the engine's file says that there is something."""
    busy = RuntimeUnavailableError("own", "it is in use", "Wait.")
    runtime = OwnRuntime(by_url, close_network=raising(busy))

    async with engine_on(tmp_path, runtime, agent="echo", network="open"):
        pass

    assert "cannot remove the network of the engine: own: it is in use" in caplog.text
    assert len(list((tmp_path / "data" / "engines").iterdir())) == 1


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_network_that_cannot_be_had(
    tmp_path: Path, autojump_clock: MockClock, *, hangs: bool
) -> None:
    """There is no engine then; what may appear later yet is for a sweep."""
    no = RuntimeUnavailableError("own", "there is none", "Do without.")
    runtime = OwnRuntime(by_url, open_network=hang if hangs else raising(no))

    with pytest.raises(RuntimeUnavailableError):
        async with engine_on(tmp_path, runtime, agent="echo", network="open"):
            pass

    assert len(list((tmp_path / "data" / "engines").iterdir())) == hangs


async def test_a_plan_shows_the_socket_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed is what would be run, whether there is a credential or not."""
    before = open_descriptors()

    async with opened(tmp_path) as (engine, runtime):
        seen: list[clawtrio.ContainerSpec] = []

        def argv(spec: clawtrio.ContainerSpec) -> list[str]:
            seen.append(spec)
            return []

        monkeypatch.setattr(runtime, "argv", argv)
        await engine.plan(GROUP)
        sockets = tmp_path / "data" / "sockets"
        assert list(sockets.iterdir()) == []

    assert "/run/clawtrio" in {m.mount.container_path for m in seen[0].mounts}
    assert open_descriptors() == before
