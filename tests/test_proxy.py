"""The credential proxy between real sockets: what passes, what does not, who pays."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import ssl
import traceback
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import h11
import pytest
import trio
import trustme
from trio.testing import wait_all_tasks_blocked

from clawtrio import SettingsError, Usage
from clawtrio._proxy import open_proxy
from clawtrio._proxy_rules import ProxyLimits
from clawtrio._proxy_tickets import tell_usage
from clawtrio._proxy_upstream import check_credential

from .upstream import (
    JSON,
    MESSAGE,
    PATIENCE,
    SECRET,
    SSE,
    Answer,
    Call,
    Client,
    Wallet,
    World,
    credential_for,
    open_api,
    open_world,
    silent,
    unix_listener,
    until,
)


async def test_the_api_gets_the_key_and_the_client_the_answer() -> None:
    """A request goes on with the real key in place of the token, and is counted."""
    async with open_world(path="/base") as world:
        answer = await world.ask(
            target="/v1/messages?beta=true", headers=[("X-One", "1")], body=b"{}"
        )

        assert answer.status == 200
        assert json.loads(answer.body) == MESSAGE
        (call,) = world.api.calls
        assert (call.method, call.target) == ("POST", "/base/v1/messages?beta=true")
        assert call.header("x-api-key") == SECRET
        assert call.header("authorization") is None
        assert call.header("x-one") == "1"
        assert call.header("host") == f"127.0.0.1:{world.api.port}"
        assert call.body == b"{}"
        await wait_all_tasks_blocked()
        assert world.ticket.usage == Usage(
            requests=1,
            request_bytes=2,
            response_bytes=len(answer.body),
            statuses=((200, 1),),
            input_tokens=7,
            output_tokens=5,
            cache_creation_input_tokens=3,
            cache_read_input_tokens=2,
        )


async def test_an_oauth_token_goes_where_the_api_wants_it() -> None:
    """OAuth is a bearer token and a beta, whichever header the run's token came in."""
    async with open_world(scheme="oauth") as world:
        await world.ask(headers=[("anthropic-beta", "one")])
        bearer = ("authorization", f"Bearer {world.ticket.token}")
        await world.ask(headers=[bearer], token="placeholder")

        first, second = world.api.calls
        assert first.header("authorization") == f"Bearer {SECRET}"
        assert first.header("anthropic-beta") == "one,oauth-2025-04-20"
        assert second.header("authorization") == f"Bearer {SECRET}"
        assert second.header("x-api-key") is None


async def test_a_connection_serves_one_request_after_the_other() -> None:
    """Keep-alive holds on both sides; pipelined requests are answered in order."""
    async with open_world() as world:
        client = await world.connect()
        for _ in range(3):
            assert (await world.ask(client=client, body=b"x")).status == 200
            client.http.start_next_cycle()
        twice = (
            b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
            b"X-Api-Key: %b\r\n\r\n{}" % world.ticket.token.encode()
        )
        got = await world.ask_raw(twice + twice + b"BREAK\r\n\r\n")

        assert got.count(b"HTTP/1.1 200 ") == 2
        assert got.count(b"HTTP/1.1 400 ") == 1
        assert world.ticket.usage.requests == 5
        assert world.api.connections == 1
        await client.stream.aclose()


async def test_requests_are_pipelined_while_an_answer_is_due() -> None:
    """What a client sends ahead is kept, up to the size of a head."""

    async def slow(call: Call) -> None:
        await call.read()
        await trio.sleep(0.1)
        await call.reply(b"{}")

    async with open_world(slow) as world:
        client = await world.connect()
        async with client.stream:
            raw = (
                b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nX-Api-Key: %b\r\n\r\n"
                % world.ticket.token.encode()
            )
            await client.stream.send_all(raw)
            await trio.sleep(0.05)
            await client.stream.send_all(raw)
            got = b""
            with trio.fail_after(PATIENCE):
                while got.count(b"HTTP/1.1 200 ") < 2:
                    got += await client.stream.receive_some()


async def test_a_client_that_sends_far_ahead_is_cut_off() -> None:
    """Nothing piles up for a client that does not wait for answers."""
    async with open_world(silent) as world:
        client = await world.connect()
        async with client.stream:
            await client.send(world.head())
            await client.send(h11.EndOfMessage())
            with trio.fail_after(PATIENCE), pytest.raises(trio.BrokenResourceError):
                await client.stream.send_all(b"x" * 2**26)
            await world.api.gone.wait()


@pytest.mark.parametrize("token", ["wrong", "", "ü".encode().decode("latin-1")])
async def test_without_the_token_nothing_goes_on(
    caplog: pytest.LogCaptureFixture, token: str
) -> None:
    """A wrong token is 401 in the API's format, with one warning that names the run."""
    async with open_world(own_listener=True) as world:
        for _ in range(3):
            headers = f"X-Api-Key: {token}\r\n".encode("latin-1") if token else b""
            got = await world.ask_raw(
                b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                + headers
                + b"\r\n"
            )
            assert got.startswith(b"HTTP/1.1 401 ")
            assert b'"type": "authentication_error"' in got

        assert world.api.connections == 0
        (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
        assert "family" in record.getMessage()
        assert (record.__dict__["group"], record.__dict__["run"]) == ("family", "1f")
        assert world.ticket.token not in caplog.text
        assert world.ticket.token not in repr(world.ticket)


async def test_a_listener_that_all_share_warns_of_strangers_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where no run is known, none is named."""
    async with open_world() as world:
        for _ in range(2):
            assert (await world.ask(token="wrong")).error == "authentication_error"

    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "a request with no run's token was refused"
    ]


async def test_a_run_s_listener_takes_no_other_run_s_token() -> None:
    """On another's socket, or after another's token, a live token is worthless."""
    async with open_world(own_listener=True) as world:
        with world.proxy.admit("other", "2e") as other:
            assert (await world.ask(token=other.token)).status == 401
    async with open_world() as world:
        with world.proxy.admit("other", "2e") as other:
            assert (await world.ask(token=other.token)).status == 200
            client = await world.connect()
            assert (await world.ask(client=client)).status == 200
            client.http.start_next_cycle()
            assert (await world.ask(client=client, token=other.token)).status == 401
            await client.stream.aclose()


async def test_a_token_dies_with_its_run(caplog: pytest.LogCaptureFixture) -> None:
    """A dead token is 401, with one warning that names the run it was of."""
    caplog.set_level(logging.INFO)
    async with open_world() as world:
        with world.proxy.admit("other", "2e") as other:
            client = await world.connect()
            assert (await world.ask(client=client, token=other.token)).status == 200
            await wait_all_tasks_blocked()
        with trio.fail_after(PATIENCE):
            assert await client.stream.receive_some() == b""
        await client.stream.aclose()
        for _ in range(2):
            assert (await world.ask(token=other.token)).status == 401
        assert len(world.api.calls) == 1

    mine = [r.getMessage() for r in caplog.records if r.__dict__.get("run") == "2e"]
    assert mine == [
        f"[other 2e] {tell_usage(other.usage)}",
        "[other 2e] a request without the token of a live run was refused",
    ]


async def test_the_end_of_a_run_cuts_off_what_is_in_flight() -> None:
    """Requests in flight, idle connections and the run's own listener end at once."""
    async with open_world(silent) as world, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        with world.proxy.admit("other", "2e") as other:
            # Both end with the ticket: that is what is tested.
            serve = partial(world.proxy.serve, listener, ticket=other)
            await nursery.start(serve)
            client = Client(await trio.open_tcp_stream("127.0.0.1", port))
            await client.send(world.head(token=other.token))
            await client.send(h11.EndOfMessage())
            idle = await trio.open_tcp_stream("127.0.0.1", port)
            await until(lambda: world.api.calls)
        started = trio.current_time()
        with trio.fail_after(PATIENCE):
            assert await client.stream.receive_some() == b""
            assert await idle.receive_some() == b""
            await world.api.gone.wait()
        assert trio.current_time() - started < 1
        with pytest.raises(OSError, match="all attempts"):
            await trio.open_tcp_stream("127.0.0.1", port)
        await client.stream.aclose()
        await idle.aclose()


async def test_a_dead_run_s_listener_is_closed_at_once() -> None:
    """Serving for a run that is over ends before it begins."""
    async with open_proxy(Wallet(None)) as proxy:
        with proxy.admit("family", "1f") as ticket:
            pass
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        with trio.fail_after(PATIENCE):
            await proxy.serve(listener, ticket=ticket)
        assert listener.socket.fileno() == -1


async def test_a_unix_socket_will_do(tmp_path: Path) -> None:
    """A container without a network connects to a socket that is mounted into it."""
    path = str(tmp_path / "s")
    async with open_world() as world, trio.open_nursery() as nursery:
        listener = await unix_listener(path)
        serve = partial(world.proxy.serve, listener, ticket=world.ticket)
        await nursery.start(serve)
        client = Client(await trio.open_unix_socket(path))
        assert (await world.ask(client=client, body=b"x" * 10**6)).status == 200
        await client.stream.aclose()
        nursery.cancel_scope.cancel()


async def test_what_is_not_on_the_list_goes_nowhere() -> None:
    """Denied is 403 in the API's format; configured paths can be had."""
    async with open_world() as world:
        answer = await world.ask("GET", "/api/oauth/profile")
        assert (answer.status, answer.error) == (403, "permission_error")
        assert world.api.connections == 0
    async with open_world(paths=["/v1/models"]) as world:
        assert (await world.ask("GET", "/v1/models")).status == 200
        assert (await world.ask()).status == 403
    with pytest.raises(SettingsError, match="never"):
        async with open_proxy(Wallet(None), paths=["/v1/files"]):
            pass


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("/api", "/oauth/x"),
        ("/gate/API", "/oauth/x"),
        ("/v1", "/files"),
        ("/v1/messages", "/batches"),
    ],
)
async def test_a_base_url_s_path_opens_no_other_way(base: str, path: str) -> None:
    """What is never to be called is not called by halves."""
    async with open_world(path=base, paths=[path]) as world:
        answer = await world.ask(target=path)

        assert (answer.status, answer.error) == (403, "permission_error")
        assert world.ticket.usage.requests == 0
        assert world.api.connections == 0


async def test_a_gateway_s_path_may_be_any() -> None:
    """Of what is before the path of a request, the operator alone decides."""
    async with open_world(path="/v1/organizations/mine") as world:
        assert (await world.ask()).status == 200


async def test_without_a_credential_there_is_503() -> None:
    """An agent that needs no API can run; one that asks is told."""
    async with open_world() as world:
        world.wallet.credential = None
        answer = await world.ask()

        assert (answer.status, answer.error) == (503, "api_error")
        assert world.ticket.usage == Usage(statuses=((503, 1),))
        assert world.api.connections == 0


async def test_a_renewed_credential_is_used_for_the_next_request() -> None:
    """Nothing has to be started again."""
    async with open_world() as world:
        await world.ask()
        world.wallet.credential = credential_for(world.api.port, "oauth")
        await world.ask()

        assert world.api.calls[0].header("x-api-key") == SECRET
        assert world.api.calls[1].header("authorization") == f"Bearer {SECRET}"


@pytest.mark.parametrize(("requests", "tokens"), [(2, None), (None, 6)])
async def test_beyond_the_budget_there_is_429(
    caplog: pytest.LogCaptureFixture, requests: int | None, tokens: int | None
) -> None:
    """A run that has used its budget is told so, without being asked to retry."""
    async with open_world(max_requests=requests, max_output_tokens=tokens) as world:
        assert [(await world.ask()).status for _ in range(2)] == [200, 200]
        for _ in range(2):
            answer = await world.ask()
            assert (answer.status, answer.error) == (429, "rate_limit_error")
            assert answer.header("x-should-retry") == "false"

        assert len(world.api.calls) == 2
        assert world.ticket.usage.statuses == ((200, 2), (429, 2))
        assert caplog.text.count("is used up") == 1


async def test_events_come_as_they_are_sent() -> None:
    """Each piece of a stream reaches the client before the next is written."""
    got = trio.Event()

    async def streaming(call: Call) -> None:
        nonlocal got
        await call.read()
        await call.head(200, SSE)
        for number in range(20):
            got = trio.Event()
            await call.send(b"data: %d\n\n" % number)
            with trio.fail_after(PATIENCE):
                await got.wait()
        await call.end()

    async with open_world(streaming) as world:
        client = await world.connect()
        await client.send(world.head())
        await client.send(h11.EndOfMessage())
        head = await client.next_event()
        assert isinstance(head, h11.Response)
        pieces = []
        while isinstance(event := await client.next_event(), h11.Data):
            pieces.append(bytes(event.data))
            got.set()
        assert pieces == [b"data: %d\n\n" % number for number in range(20)]
        await client.stream.aclose()


async def test_an_upload_in_chunks_goes_on_in_chunks() -> None:
    """A body without a length is passed on, its trailers are dropped."""
    async with open_world() as world:
        client = await world.connect()
        await client.send(world.head(headers=[("transfer-encoding", "chunked")]))
        await client.send(h11.Data(data=b"one"))
        await client.send(h11.Data(data=b"two"))
        await client.send(h11.EndOfMessage(headers=[("x-trailer", "1")]))
        assert (await client.answer()).status == 200

        (call,) = world.api.calls
        assert call.header("transfer-encoding") == "chunked"
        assert call.body == b"onetwo"
        await client.stream.aclose()


async def test_a_client_that_waits_to_be_asked_is_asked() -> None:
    """Expect: 100-continue is answered by us, and only if the body is wanted."""
    expecting = [("expect", "100-continue"), ("content-length", "2")]
    async with open_world() as world:
        client = await world.connect()
        await client.send(world.head(headers=expecting))
        with trio.fail_after(PATIENCE):
            event = await client.next_event()
        assert isinstance(event, h11.InformationalResponse)
        assert event.status_code == 100
        await client.send(h11.Data(data=b"{}"))
        await client.send(h11.EndOfMessage())
        assert (await client.answer()).status == 200
        assert world.api.calls[0].header("expect") is None
        await client.stream.aclose()

        refused = await world.connect()
        await refused.send(world.head(headers=expecting, token="wrong"))
        event = await refused.next_event()
        assert isinstance(event, h11.Response)
        assert event.status_code == 401
        await refused.stream.aclose()


async def test_a_head_request_has_no_body() -> None:
    """HEAD is answered with a head, by the API and by us."""
    async with open_world() as world:
        answer = await world.ask("HEAD", "/api/hello")
        assert (answer.status, answer.body, answer.is_whole) == (200, b"", True)
        assert answer.header("content-length") is not None
        answer = await world.ask("HEAD", "/api/hello", token="wrong")
        assert (answer.status, answer.body, answer.is_whole) == (401, b"", True)


async def test_the_api_s_own_answers_pass_unchanged() -> None:
    """Statuses, reasons, redirects and encodings are the API's; none is followed."""
    body = gzip.compress(json.dumps(MESSAGE).encode())

    async def redirecting(call: Call) -> None:
        await call.read()
        headers = [
            ("location", "http://127.0.0.2/"),
            ("set-cookie", "a=b"),
            ("set-cookie", "c=d"),
            ("x-echo", SECRET),
            ("content-type", "application/json"),
            ("content-encoding", "gzip"),
            ("content-length", str(len(body))),
        ]
        await call.head(307, headers, reason="Over There")
        await call.send(body)
        await call.end()

    async with open_world(redirecting) as world:
        answer = await world.ask()

        assert answer.status == 307
        assert answer.body == body
        assert answer.header("location") == "http://127.0.0.2/"
        assert [v for n, v in answer.headers if n == "set-cookie"] == ["a=b", "c=d"]
        assert answer.header("x-echo") is None
        assert world.api.calls[0].header("accept-encoding") == "identity"
        assert world.ticket.usage.output_tokens == 0
        raw = await world.ask_raw(
            b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            b"X-Api-Key: %b\r\n\r\n" % world.ticket.token.encode()
        )
        assert raw.startswith(b"HTTP/1.1 307 Over There\r\n")


async def test_a_reason_with_the_credential_is_left_out() -> None:
    """An API that echoes into its first line does not tell the agent, either."""

    async def echoing(call: Call) -> None:
        await call.read()
        await call.head(400, [("content-length", "0")], reason=f"bad key {SECRET}")
        await call.end()

    async with open_world(echoing) as world:
        raw = await world.ask_raw(
            b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            b"X-Api-Key: %b\r\n\r\n" % world.ticket.token.encode()
        )

    assert raw.startswith(b"HTTP/1.1 400 \r\n")


async def breaking_off(call: Call) -> None:
    """Announce more than there is."""
    await call.read()
    await call.head(200, [*JSON, ("content-length", "100")])
    await call.raw(b'{"type": "message"')


async def breaking_chunks(call: Call) -> None:
    """Leave within a stream."""
    await call.read()
    await call.head(200, SSE)
    await call.send(b"data: 1\n\n")


async def breaking_rules(call: Call) -> None:
    """Write a chunk that is none."""
    await call.read()
    await call.head(200, SSE)
    await call.raw(b"what?\r\n")


async def test_each_record_says_of_whom_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Group and run are in all that a run brings about, warned of or not."""
    caplog.set_level(logging.DEBUG, "clawtrio")

    def fail(_: Wallet) -> None:
        raise ZeroDivisionError

    async with open_world(breaking_off, is_sound=False, own_listener=True) as world:
        await world.ask()
        await world.ask("GET", "/api/oauth/profile")
        client = await world.connect()
        await client.stream.send_all(b"POST")
        await until(lambda: world.ticket.connections)
        linger = b"\x01\0\0\0\0\0\0\0"
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await client.stream.aclose()
        await until(lambda: not world.ticket.connections)
        monkeypatch.setattr(Wallet, "current", fail)
        client = await world.connect()
        async with client.stream:
            await client.send(world.head())
            await until(lambda: "connection to" in caplog.text)

    records = [r for r in caplog.records if r.name.startswith("clawtrio._proxy")]
    assert {(r.__dict__["group"], r.__dict__["run"]) for r in records} == {
        ("family", "1f")
    }
    said = "\n".join(r.getMessage() for r in records)
    for words in ("did not answer", "refused: 403", "has left", "connection to"):
        assert words in said


@pytest.mark.parametrize("handler", [breaking_off, breaking_chunks, breaking_rules])
async def test_a_response_that_breaks_off_is_seen_to_break_off(
    handler: Callable[[Call], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    """The client never takes half a response for a whole one."""
    async with open_world(handler) as world:
        answer = await world.ask()

        assert answer.status == 200
        assert not answer.is_whole
        assert caplog.text.count("did not answer as it should") == 1


async def leaving(call: Call) -> None:
    """Leave without a word."""
    await call.read()


async def talking_nonsense(call: Call) -> None:
    """Speak another protocol."""
    await call.read()
    await call.raw(b"SMTP " + SECRET.encode() + b"\r\n\r\n")


async def switching(call: Call) -> None:
    """Answer with a protocol that nobody wanted."""
    await call.read()
    await call.raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")


async def test_a_bug_costs_a_connection_and_no_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong with one of them is told, and the next one is served."""

    def fail(_: Wallet) -> None:
        raise ZeroDivisionError

    async with open_world(is_sound=False) as world:
        with monkeypatch.context() as patch:
            patch.setattr(Wallet, "current", fail)
            client = await world.connect()
            async with client.stream:
                await client.send(world.head())
                assert await client.stream.receive_some() == b""
        answer = await world.ask()

    assert answer.status == 200
    assert "a connection to the credential proxy failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("handler", [leaving, talking_nonsense, switching])
async def test_no_answer_is_502(
    handler: Callable[[Call], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    """An API that does not speak HTTP is told of; its words are not logged."""
    async with open_world(handler) as world:
        answer = await world.ask()

        assert (answer.status, answer.error) == (502, "api_error")
        assert SECRET not in caplog.text
        assert SECRET.encode() not in answer.body


async def test_an_api_that_is_not_there_is_502(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line in the log says why; clients may try again."""
    async with open_world() as world:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        port = listener.socket.getsockname()[1]
        await listener.aclose()
        world.wallet.credential = credential_for(port)
        answer = await world.ask()
        assert (answer.status, answer.error) == (502, "api_error")
        assert answer.header("x-should-retry") is None

    assert caplog.text.count("did not answer as it should: ConnectError: ") == 1
    assert "refused" in caplog.text


async def test_an_api_that_is_silent_is_504() -> None:
    """Silence and slowness have their limits."""
    limits = ProxyLimits(silence_timeout=0.2)
    async with open_world(silent, limits=limits) as world:
        answer = await world.ask()
        assert (answer.status, answer.error) == (504, "timeout_error")
    async with open_world(silent, limits=ProxyLimits(total_timeout=0.7)) as world:
        answer = await world.ask()
        assert (answer.status, answer.error) == (504, "timeout_error")
        with trio.fail_after(PATIENCE):
            await world.api.gone.wait()


async def test_a_stream_that_takes_too_long_is_broken_off() -> None:
    """The total time bounds streams, too."""

    async def endless(call: Call) -> None:
        await call.read()
        await call.head(200, SSE)
        while True:
            await call.send(b"data: 1\n\n")
            await trio.sleep(0.02)

    async with open_world(endless, limits=ProxyLimits(total_timeout=1)) as world:
        answer = await world.ask()

        assert answer.status == 200
        assert not answer.is_whole


async def test_a_stream_that_falls_silent_is_broken_off() -> None:
    """Events that cease are no answer; who thinks before it begins has more time."""

    async def ceasing(call: Call) -> None:
        await call.read()
        await trio.sleep(0.6)
        await call.head(200, SSE)
        await call.send(b"data: 1\n\n")
        await call.wait_gone()

    limits = ProxyLimits(silence_timeout=PATIENCE, stream_timeout=0.3)
    async with open_world(ceasing, limits=limits) as world:
        answer = await world.ask()
        assert (answer.status, answer.is_whole) == (200, False)
        with trio.fail_after(PATIENCE):
            await world.api.gone.wait()


async def test_tls_is_verified(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The key goes to an API that proves its name, and to no other."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with open_api(tls=context) as api:
        wallet = Wallet(credential_for(api.port, url_scheme="https", host="localhost"))

        async def ask() -> Answer:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listener.socket.getsockname()[1]
            async with open_proxy(wallet) as proxy, trio.open_nursery() as nursery:
                nursery.start_soon(proxy.serve, listener)
                with proxy.admit("family", "1f") as ticket:
                    answer = await World(api, proxy, ticket, port, wallet).ask()
                nursery.cancel_scope.cancel()
            return answer

        assert (await ask()).status == 502
        assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
        with authority.cert_pem.tempfile() as path:
            monkeypatch.setenv("SSL_CERT_FILE", path)
            assert (await ask()).status == 200
            wallet.credential = credential_for(api.port, url_scheme="https")
            assert (await ask()).status == 502
        assert [call.header("x-api-key") for call in api.calls] == [SECRET]


async def test_no_secret_is_seen_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    """Neither logs at DEBUG nor answers, reprs or tracebacks have the key or token."""
    caplog.set_level(logging.DEBUG)
    seen = ""
    async with open_world(breaking_chunks, max_requests=2) as world:
        for token in (None, "wrong", None, None):
            answer = await world.ask(token=token)
            seen += f"{answer}"
        error = LookupError(world.wallet, world.ticket, world.ticket.usage)
        seen += "".join(traceback.format_exception(error))
        assert world.ticket.token not in caplog.text + seen

    assert SECRET not in caplog.text + seen
    assert caplog.records


@pytest.mark.parametrize(
    ("status", "state"),
    [
        *((401, "dead"), (403, "dead")),
        *((400, "alive"), (200, "alive"), (404, "alive"), (529, "alive")),
    ],
)
async def test_a_credential_can_be_checked(status: int, state: str) -> None:
    """A question that costs nothing tells a dead key from a live one."""

    async def judging(call: Call) -> None:
        await call.read()
        await call.reply(b"{}", status)

    async with open_api(judging) as api:
        found = await check_credential(credential_for(api.port, "oauth"))

        assert found.state == state
        assert str(status) in found.detail
        assert SECRET not in found.detail
        (call,) = api.calls
        assert (call.method, call.target) == ("POST", "/v1/messages/count_tokens")
        assert call.header("authorization") == f"Bearer {SECRET}"
        assert call.body == b"{}"


async def test_nobody_to_ask_about_a_credential_is_no_verdict() -> None:
    """A network that is down, or silent, says nothing about the key."""
    async with open_api(silent) as api:
        started = trio.current_time()
        found = await check_credential(credential_for(api.port), check_timeout=0.2)
        assert found.state == "unreachable"
        assert trio.current_time() - started < PATIENCE
    found = await check_credential(credential_for(api.port))
    assert found.state == "unreachable"
