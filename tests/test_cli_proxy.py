"""The credential proxy at a terminal."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import h11
import pytest
import trio

from clawtrio._cli import execute
from clawtrio._cli_proxy import serve_proxy
from clawtrio._cli_runs import UsageError
from clawtrio._cli_terminal import Interrupts
from clawtrio._settings import Settings

from .upstream import PATIENCE, SECRET, Client, FakeApi, open_api


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a credential of their own."""
    for name in ("API_KEY", "AUTH_TOKEN", "BASE_URL"):
        monkeypatch.delenv(f"ANTHROPIC_{name}", raising=False)
    monkeypatch.delenv("CLAUDE_CODE_OAUTH_TOKEN", raising=False)


def settings_with_key(root: Path, api: FakeApi) -> Settings:
    """Make a root with a key for *api*."""
    lines = (
        f"ANTHROPIC_API_KEY={SECRET}\nANTHROPIC_BASE_URL=http://127.0.0.1:{api.port}"
    )
    (root / ".env").write_text(lines)
    return Settings(root=str(root), max_requests=1)


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")]
)
async def test_it_says_where_it_is_and_what_was_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], host: str, shown: str
) -> None:
    """What it prints first is what an agent needs; the budget of the settings holds."""
    interrupts = Interrupts()
    codes = []

    async def run(settings: Settings) -> None:
        codes.append(await serve_proxy(settings, host, 0, interrupts))

    async with open_api() as api:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, settings_with_key(tmp_path, api))
                out = ""
                while "\n" not in out:
                    await trio.sleep(0.01)
                    out += capfd.readouterr().out
                found = re.fullmatch(
                    r"ANTHROPIC_BASE_URL=http://(.*):(\d+) ANTHROPIC_API_KEY=(\S+)\n",
                    out,
                )
                assert found is not None
                assert found[1] == shown
                assert await ask(host, int(found[2]), found[3]) == 200
                assert await ask(host, int(found[2]), found[3]) == 429
                interrupts.stop()
        assert api.calls[0].header("x-api-key") == SECRET

    captured = capfd.readouterr()
    assert codes == [0]
    assert captured.out == (
        "1 API requests, 0 bytes up and 195 down, answers: 1 x 200, 1 x 429; "
        "7 tokens in, 3 to and 2 from the cache, 5 out\n"
    )
    assert SECRET not in out + captured.out + captured.err
    assert "warning" not in captured.err


async def ask(host: str, port: int, token: str) -> int:
    """Ask one thing with a token; return the status."""
    client = Client(await trio.open_tcp_stream(host, port))
    async with client.stream:
        await client.send(
            h11.Request(
                method="POST",
                target="/v1/messages",
                headers=[("host", "a"), ("x-api-key", token)],
            )
        )
        await client.send(h11.EndOfMessage())
        return (await client.answer()).status


async def test_an_open_address_is_warned_about(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All addresses are listened on only if asked for, and not without a word."""
    interrupts = Interrupts()
    async with open_api() as api, trio.open_nursery() as nursery:
        settings = settings_with_key(tmp_path, api)
        nursery.start_soon(partial(serve_proxy, settings, "0.0.0.0", 0, interrupts))
        err = ""
        with trio.fail_after(PATIENCE):
            while "Ctrl-C" not in err:
                await trio.sleep(0.01)
                err += capfd.readouterr().err
        interrupts.stop()

    assert "warning: 0.0.0.0 can be reached from other machines" in err
    assert "by ANTHROPIC_API_KEY" in err


async def test_an_address_that_is_taken_is_told(tmp_path: Path) -> None:
    """A port that others have, or a name that is none, is the command line's error."""
    async with open_api() as api:
        settings = settings_with_key(tmp_path, api)
        with pytest.raises(UsageError, match=f"port {api.port}"):
            await serve_proxy(settings, "127.0.0.1", api.port, Interrupts())
        with pytest.raises(UsageError, match=r"cannot listen on a\.\.b"):
            await serve_proxy(settings, "a..b", 0, Interrupts())


def test_without_a_credential_it_says_what_to_put_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to serve, and a remedy in one line."""
    assert execute(["proxy", "--root", str(tmp_path)]) == 1

    err = capsys.readouterr().err
    assert "no credential in" in err
    assert "ANTHROPIC_API_KEY" in err
