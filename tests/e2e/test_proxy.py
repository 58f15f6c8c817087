"""The way to the API as a container has it, and all the ways that it has not."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from clawtrio import AgentOutput, Ending, Engine, Run, Usage, open_engine
from tests.helpers import own_addresses
from tests.upstream import (
    SECRET,
    SSE,
    Call,
    FakeApi,
    Handler,
    answering,
    open_api,
    write_env,
)

from .conftest import Site, group, processes
from .test_killed import host

log = logging.getLogger(__name__)

#: Seconds for what is to be seen at once, on a busy machine.
AT_ONCE: Final = 1.0

#: Works out what it is told, and says what comes of it.
AGENT: Final = """
import glob, hashlib, http.client, socket, urllib.parse

URL = urllib.parse.urlsplit(os.environ["ANTHROPIC_BASE_URL"])
TOKEN = os.environ.get("ANTHROPIC_API_KEY") or os.environ["CLAUDE_CODE_OAUTH_TOKEN"]

def call(body=b"{}", **headers):
    connection = http.client.HTTPConnection(URL.netloc, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/messages", body, headers)
    return connection.getresponse()

def ask(**headers):
    response = call(**headers)
    answer = json.loads(response.read())
    return [response.status, answer.get("error", answer)["type"]]

def echo():
    body = os.urandom(2**20)
    if call(body, x_api_key=TOKEN).read() == body:
        return hashlib.sha256(body).hexdigest()

def stream():
    response = call(x_api_key=TOKEN)
    while line := response.readline():
        emit(line.decode(), partial=True)

def lines(path):
    return open(path).readlines() if os.path.exists(path) else []

def network():
    sys_class = "/sys/class/net"
    return {
        "devices": [line.split(":")[0].strip() for line in lines("/proc/net/dev")[2:]],
        "known": os.listdir(sys_class) if os.path.exists(sys_class) else [],
        "routes": [line.split()[0] for line in lines("/proc/net/route")[1:]],
        "routes6": [line.split()[-1] for line in lines("/proc/net/ipv6_route")],
    }

KEPT = []

def listen(name):
    KEPT.append(socket.create_server(("", 0)))
    KEPT.append(socket.socket(socket.AF_UNIX))
    KEPT[-1].bind("\\\\0" + name)
    KEPT[-1].listen()
    return KEPT[0].getsockname()[1]

def reaches(address):
    try:
        if isinstance(address, str):
            socket.socket(socket.AF_UNIX).connect("\\\\0" + address)
        else:
            socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True

SYSTEM = ("/proc", "/sys", "/usr", sys.prefix, sys.base_prefix)

def places():
    for kind in ("environ", "cmdline", "mountinfo"):
        yield from glob.glob(f"/proc/[0-9]*/{kind}")
    for place, directories, files in os.walk("/"):
        inside = [os.path.join(place, name) for name in directories]
        directories[:] = [os.path.basename(p) for p in inside if p not in SYSTEM]
        for path in (os.path.join(place, name) for name in files):
            if os.path.isfile(path) and not os.path.islink(path):
                yield path

# Backwards, as it is told of them: it is no place where they are found itself.
def search(*backwards):
    found = []
    for path in places():
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            continue
        for word in backwards:
            if word[::-1].encode() in content:
                found.append([word, path])
    return found

while (line := hear()) and line.get("type") != "close":
    emit(json.dumps(eval(line.get("prompt") or line["text"])))
"""


@asynccontextmanager
async def opened(
    site: Site,
    handler: Handler = answering,
    *,
    variable: str = "ANTHROPIC_API_KEY",
    **changes: Any,
) -> AsyncIterator[tuple[FakeApi, Engine]]:
    """Have an API, a credential for it, and an engine."""
    with trio.fail_after(60):
        async with open_api(handler) as api:
            write_env(site.root, api.port, variable)
            given = {"agent_command": site.agent(AGENT), **changes}
            async with open_engine(site.settings(**given)) as engine:
                yield api, engine


async def heard(run: Run) -> Any:
    """Return what the agent says next."""
    return said(await anext(run))


def said(output: AgentOutput) -> Any:
    assert output.result is not None, output.error
    return json.loads(output.result)


async def tell(run: Run, expression: str) -> Any:
    """Have the agent work something out."""
    await run.send(expression)
    return await heard(run)


def sockets_of(site: Site) -> list[str]:
    """List the directories that runs have for their sockets."""
    return [path.name for path in (site.root / "data" / "sockets").iterdir()]


@pytest.mark.parametrize(
    ("variable", "header", "value"),
    [
        ("ANTHROPIC_API_KEY", "x-api-key", SECRET),
        ("CLAUDE_CODE_OAUTH_TOKEN", "authorization", f"Bearer {SECRET}"),
    ],
)
async def test_the_token_is_exchanged(
    site: Site, variable: str, header: str, value: str
) -> None:
    """With its token an agent reaches the API, which sees the credential alone."""
    refused = [401, "authentication_error"]

    async with (
        opened(site, variable=variable) as (api, engine),
        engine.open_run(group(), "ask()", chat_jid="tg:1") as run,
    ):
        assert await heard(run) == refused
        assert await tell(run, "ask(x_api_key='sk-ant-wrong')") == refused
        assert api.connections == 0
        assert await tell(run, "ask(x_api_key=TOKEN)") == [200, "message"]
        bearer = "ask(authorization='Bearer ' + TOKEN)"
        assert await tell(run, bearer) == [200, "message"]
        token = await tell(run, "TOKEN")
        run.finish()
        result = await run.wait()

    assert len(api.calls) == 2
    for call in api.calls:
        assert call.header(header) == value
        assert token not in str(call.headers)
    answered = sum(len(call.body) for call in api.calls)
    assert result.ending is Ending.EXITED
    assert result.usage == Usage(
        requests=2,
        request_bytes=answered,
        response_bytes=2 * 195,
        statuses=((200, 2), (401, 2)),
        input_tokens=14,
        output_tokens=10,
        cache_creation_input_tokens=6,
        cache_read_input_tokens=4,
    )


async def test_events_arrive_one_by_one(site: Site) -> None:
    """The API sends each event only when the agent has told us of the one before."""
    heard_of, hears = trio.open_memory_channel[float](0)
    times: list[float] = []

    async def wait_and_send(call: Call) -> None:
        await call.read()
        await call.head(200, SSE)
        for number in range(20):
            times.append(trio.current_time())
            await call.send(f"data: {number}\n\n".encode())
            times[-1] = await hears.receive() - times[-1]
        await call.end()

    events = []
    async with (
        opened(site, wait_and_send) as (_, engine),
        engine.open_run(group(), "stream()", chat_jid="tg:1") as run,
    ):
        async for output in run:
            assert output.result is not None
            if not output.partial:
                break
            if output.result.startswith("data"):
                events.append(output.result)
                await heard_of.send(trio.current_time())

    assert events == [f"data: {number}\n" for number in range(20)]
    log.info("%s: an event took at most %.1f ms", site.runtime, 1e3 * max(times))
    assert max(times) < AT_ONCE


async def test_a_megabyte_each_way(site: Site) -> None:
    """What is large arrives whole, there and back."""

    async def echo(call: Call) -> None:
        await call.reply(await call.read(), headers=[])

    async with (
        opened(site, echo) as (api, engine),
        engine.open_run(group(), "echo()", chat_jid="tg:1") as run,
    ):
        digest = await heard(run)
        run.finish()
        result = await run.wait()

    assert hashlib.sha256(api.calls[0].body).hexdigest() == digest
    assert result.usage is not None
    assert (result.usage.request_bytes, result.usage.response_bytes) == (2**20, 2**20)


def seen_outside(site: Site, run: Run) -> str:
    """Return what anybody on the host can ask the system, and the runtime."""
    shown = [" ".join(process.argv) for process in processes()]
    if site.runtime == "bwrap":
        pids = [Path("/proc", pid, "environ") for pid in site.containers()]
        shown += [path.read_bytes().decode() for path in pids]
    else:
        argv = [site.runtime, "inspect", run.container_name]
        shown.append(
            subprocess.run(argv, check=True, capture_output=True).stdout.decode()
        )
    return "\n".join(shown)


async def test_no_credential_in_any_place(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No environment, command line, file, mount, log or inspection has a real one."""
    caplog.set_level(logging.DEBUG, logger="clawtrio")
    other = "sk-ant-of-the-host-itself"
    canary = "canary-that-is-found"
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", other)
    main = site.root / "groups" / "main"
    main.mkdir(parents=True)
    (main / "note").write_text(canary)
    words = [word[::-1] for word in (SECRET, other, canary)]
    changes: dict[str, Any] = {
        "agent_command": (*site.agent(AGENT), canary),
        "agent_env": {"CANARY": canary},
        "log_text": True,
    }

    async with opened(site, **changes) as (_, engine):
        main_group = group("main", is_main=True)
        async with engine.open_run(main_group, "TOKEN", chat_jid="tg:1") as run:
            token = await heard(run)
            assert await tell(run, "ask(x_api_key=TOKEN)") == [200, "message"]
            found = await tell(run, f"search{tuple(words)}")
            outside = seen_outside(site, run)
            shown = [word for process in processes() for word in process.argv]
            # The log of a failure says more.
            await run.send("os._exit(3)")
            result = await run.wait()

    # It searches well: what is there is found.
    assert {word for word, _ in found} == {canary[::-1]}
    in_files = {path for _, path in found if not path.startswith("/proc")}
    note = "groups/main/note"
    assert in_files == {"/workspace/group/note", f"/workspace/project/{note}"}
    in_processes = {Path(path).name for _, path in found} - {"note"}
    assert in_processes == {"environ", "cmdline"}
    assert outside.count(canary) >= 2
    # Nor has a command line the run's own token, which is good while it lives.
    assert not [word for word in shown if token in word]
    assert result.ending is Ending.FAILED
    logged = result.log_path.read_text()
    assert canary in logged
    assert "started" in caplog.text
    kept = [
        path.read_text(errors="replace")
        for path in site.root.rglob("*")
        if path.is_file() and path.name != ".env"
    ]
    assert logged in kept
    for text in (outside, caplog.text, *kept):
        assert SECRET not in text
        assert other not in text


async def test_nobody_else_can_be_reached(site: Site) -> None:
    """Out of reach are a live neighbour, and a listener on each of our addresses."""
    with ExitStack() as held:
        listener = held.enter_context(
            socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
            )
        )
        name = f"clawtrio-host-{site.token}"
        abstract = held.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{name}")
        abstract.listen()
        port = listener.getsockname()[1]
        on_host = [(address, port) for address in own_addresses()]
        assert {("127.0.0.1", port), ("::1", port)} < set(on_host)
        for address in on_host:
            socket.create_connection(address, timeout=5).close()

        async with (
            opened(site) as (_, engine),
            engine.open_run(
                group("neighbour"), f"listen({site.token!r})", chat_jid="tg:1"
            ) as neighbour,
            engine.open_run(group(), "network()", chat_jid="tg:2") as run,
        ):
            its_port = await heard(neighbour)
            theirs = [("127.0.0.1", its_port), ("::1", its_port), site.token]
            for own in (theirs[0], site.token):
                assert await tell(neighbour, f"reaches({own!r})") is True
            seen = await heard(run)
            tried = {
                place: await tell(run, f"reaches({place!r})")
                for place in [*on_host, name, *theirs]
            }

    assert seen["devices"] == ["lo"]
    assert set(seen["known"]) <= {"lo"}
    assert seen["routes"] == []
    assert set(seen["routes6"]) <= {"lo"}
    assert tried == dict.fromkeys(tried, False)
    assert len(tried) == len(on_host) + 4


async def test_no_other_run_s_token_is_good(site: Site) -> None:
    """Each run has its own socket and no other, and there its token alone is good."""
    refused = [401, "authentication_error"]

    async with opened(site) as (api, engine):
        dead = await engine.run(group("dead"), "TOKEN", chat_jid="tg:1")
        async with (
            engine.open_run(group("other"), "TOKEN", chat_jid="tg:2") as other,
            engine.open_run(
                group(), "os.listdir('/run/clawtrio')", chat_jid="tg:3"
            ) as run,
        ):
            token = await heard(other)
            assert await heard(run) == ["proxy.sock"]
            mounts = "\n".join(await tell(run, "lines('/proc/self/mountinfo')"))
            mode = (site.root / "data" / "sockets").stat().st_mode
            for bad in (json.loads(dead.result or ""), token):
                assert await tell(run, f"ask(x_api_key={bad!r})") == refused
            assert api.connections == 0
            assert await tell(other, "ask(x_api_key=TOKEN)") == [200, "message"]
            assert len(sockets_of(site)) == 2

    assert run.id in mounts
    assert other.id not in mounts
    # The sockets are for everybody, and nobody else on the host gets to them.
    assert oct(mode) == oct(0o40700)
    assert sockets_of(site) == []


async def keep_streaming(call: Call) -> None:
    await call.read()
    await call.head(200, SSE)
    await call.send(b"data: on and on\n\n")
    await call.wait_gone()


async def test_what_is_in_flight_is_cut_off(site: Site) -> None:
    """With the run ends its stream from the API, and its socket."""
    async with opened(site, keep_streaming) as (api, engine):
        async with engine.open_run(group(), "stream()", chat_jid="tg:1") as run:
            assert (await anext(run)).result == "data: on and on\n"
            assert not api.gone.is_set()
            stopped = trio.current_time()
            run.stop()
            with trio.fail_after(AT_ONCE):
                await api.gone.wait()
            took = trio.current_time() - stopped
            result = await run.wait()
        assert sockets_of(site) == []

    log.info("%s: cut off after %.0f ms", site.runtime, 1e3 * took)
    assert result.ending is Ending.STOPPED
    assert result.usage is not None
    assert result.usage.statuses == ((200, 1),)


async def test_the_host_is_killed(site: Site) -> None:
    """SIGKILL of the host ends the stream; the next engine removes the socket."""
    with trio.fail_after(60):
        async with open_api(keep_streaming) as api:
            write_env(site.root, api.port)
            async with host(site, AGENT, groups=["one"], prompt="stream()") as bot:
                await bot.hear_from("one")
                (left,) = sockets_of(site)
                await bot.kill()
                with trio.fail_after(AT_ONCE):
                    await api.gone.wait()
            assert sockets_of(site) == [left]
            async with open_engine(site.settings(AGENT)) as engine:
                assert sockets_of(site) == []
                api.handler = answering
                result = await engine.run(
                    group("one"), "ask(x_api_key=TOKEN)", chat_jid="tg:1"
                )

    assert result.result == '[200, "message"]'


@pytest.mark.parametrize("budget", [{"max_requests": 1}, {"max_output_tokens": 5}])
async def test_a_budget_is_used_up(site: Site, budget: dict[str, Any]) -> None:
    """A run gets what it may, and then 429; the next one gets as much again."""
    async with opened(site, **budget) as (api, engine):
        for _ in range(2):
            twice = "[ask(x_api_key=TOKEN) for _ in range(2)]"
            result = await engine.run(group(), twice, chat_jid="tg:1")
            answers = json.loads(result.result or "")
            assert answers == [[200, "message"], [429, "rate_limit_error"]]
            assert result.usage is not None
            assert result.usage.statuses == ((200, 1), (429, 1))

    assert len(api.calls) == 2


async def test_a_credential_is_renewed(site: Site) -> None:
    """A live run goes on with the new one, without a word."""
    async with (
        opened(site) as (api, engine),
        engine.open_run(group(), "ask(x_api_key=TOKEN)", chat_jid="tg:1") as run,
    ):
        assert await heard(run) == [200, "message"]
        write_env(site.root, api.port, secret="sk-ant-the-new-one")
        await trio.sleep(1.5)
        assert await tell(run, "ask(x_api_key=TOKEN)") == [200, "message"]

    keys = [call.header("x-api-key") for call in api.calls]
    assert keys == [SECRET, "sk-ant-the-new-one"]
