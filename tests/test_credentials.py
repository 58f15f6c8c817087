"""Where the API's credential is found, and when what is found is believed."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import attrs
import pytest

from clawtrio import CredentialsError
from clawtrio._credentials import (
    BaseUrl,
    Credential,
    CredentialFile,
    choose_credential,
)

KEY = "ANTHROPIC_API_KEY"
OAUTH = "CLAUDE_CODE_OAUTH_TOKEN"
AUTH = "ANTHROPIC_AUTH_TOKEN"
URL = "ANTHROPIC_BASE_URL"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have a credential of their own."""
    for name in (KEY, OAUTH, AUTH, URL):
        monkeypatch.delenv(name, raising=False)


def write(root: Path, text: str | bytes, *, age: float = 60.0) -> None:
    """Write .env, as if some time ago; each content has a time of its own."""
    path = root / ".env"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    moment = time.time() - age - len(text) / 1000
    os.utime(path, (moment, moment))


def file_in(root: Path, **changes: Any) -> CredentialFile:
    """Make one that looks each time, and believes a loss at once."""
    return CredentialFile(root, **{"interval": 0, "grace": 0, **changes})


def secret_of(file: CredentialFile) -> str | None:
    """Return the secret that is good now."""
    credential = file.current()
    return None if credential is None else credential.secret


@pytest.mark.parametrize(
    ("lines", "environment", "scheme", "secret"),
    [
        ({KEY: "a"}, {}, "api-key", "a"),
        ({OAUTH: "b"}, {}, "oauth", "b"),
        ({AUTH: "c"}, {}, "oauth", "c"),
        ({OAUTH: "b", AUTH: "c", KEY: "a"}, {}, "api-key", "a"),
        ({OAUTH: "b", AUTH: "c"}, {}, "oauth", "b"),
        ({}, {KEY: "a"}, "api-key", "a"),
        ({OAUTH: "b"}, {KEY: "a"}, "oauth", "b"),
        ({KEY: " "}, {OAUTH: "b"}, "oauth", "b"),
    ],
)
def test_the_file_comes_first_and_there_the_api_key(
    lines: dict[str, str], environment: dict[str, str], scheme: str, secret: str
) -> None:
    """.env goes before the environment, an API key before OAuth, empty is unset."""
    found = choose_credential(lines, environment)

    assert found is not None
    assert (found.scheme, found.secret) == (scheme, secret)
    assert found.base_url == BaseUrl(
        scheme="https", host="api.anthropic.com", port=443, path=""
    )


@pytest.mark.parametrize(
    ("text", "url", "authority"),
    [
        ("http://gate", BaseUrl(scheme="http", host="gate", port=80, path=""), "gate"),
        (
            "https://gate:8443/a/b/",
            BaseUrl(scheme="https", host="gate", port=8443, path="/a/b"),
            "gate:8443",
        ),
        (
            "http://[::1]:443/",
            BaseUrl(scheme="http", host="::1", port=443, path=""),
            "[::1]:443",
        ),
    ],
)
def test_a_base_url_has_scheme_port_and_path(
    text: str, url: BaseUrl, authority: str
) -> None:
    """Gateways are reached where ANTHROPIC_BASE_URL says."""
    found = choose_credential({KEY: "a"}, {URL: text})

    assert found is not None
    assert found.base_url == url
    assert found.base_url.authority == authority


@pytest.mark.parametrize(
    "text",
    [
        "gate",
        "ftp://gate",
        "https://",
        "https://me:word@gate",
        "https://gate/?q=word",
        "https://gate/#word",
        "https://gate/a/../b",
        "https://gate/%2e",
        "https://gate:port",
        "https://[",
        "https://" + "word" * 20,
    ],
)
def test_a_wrong_base_url_is_named_and_not_quoted(text: str) -> None:
    """What is wrong is told, but not the value: a password may be in it."""
    with pytest.raises(CredentialsError, match=URL) as caught:
        choose_credential({KEY: "a", URL: text}, {})

    assert "word" not in str(caught.value)


@pytest.mark.parametrize("secret", ["sk a", "sk\nx: y", "schlüssel", "鍵", "a\0b"])
def test_a_secret_that_fits_no_header_is_named_and_not_quoted(secret: str) -> None:
    """No value of .env can write a header of its own."""
    with pytest.raises(CredentialsError, match=OAUTH) as caught:
        choose_credential({OAUTH: secret}, {})

    assert secret not in str(caught.value)


def test_no_repr_has_the_secret() -> None:
    """What logs and tracebacks show of a credential is all but the secret."""
    found = choose_credential({KEY: "sk-word"}, {})

    assert isinstance(found, Credential)
    assert "sk-word" not in repr(found)
    assert attrs.asdict(found)["secret"] == "sk-word"


def test_nothing_found_says_what_to_put_where(tmp_path: Path) -> None:
    """Without a credential there is None, and an error that is a remedy."""
    file = file_in(tmp_path)

    assert file.current() is None
    with pytest.raises(CredentialsError) as caught:
        file.require()
    assert str(tmp_path / ".env") in caught.value.problem
    assert KEY in caught.value.remedy
    assert OAUTH in caught.value.remedy


def test_the_environment_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's environment can hold the credential; interpolation is not done."""
    monkeypatch.setenv(KEY, "one")
    file = file_in(tmp_path)

    assert file.require().secret == "one"
    write(tmp_path, f"{KEY}='${{HOME}}x'\n")
    assert file.require().secret == "${HOME}x"


def test_a_renewed_token_is_taken_within_a_second(tmp_path: Path) -> None:
    """The file is looked at again, but not more than once a second."""
    write(tmp_path, f"{OAUTH}=one")
    file = CredentialFile(tmp_path)
    assert secret_of(file) == "one"

    write(tmp_path, f"{OAUTH}=second")
    assert secret_of(file) == "one"
    time.sleep(1.1)
    assert secret_of(file) == "second"


def test_a_file_written_this_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be half written is believed once it has been left alone."""
    write(tmp_path, f"{OAUTH}=one")
    file = file_in(tmp_path)
    assert secret_of(file) == "one"

    write(tmp_path, f"{OAUTH}=sec")
    moment = (tmp_path / ".env").stat().st_mtime + 0.05
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: moment)
        assert secret_of(file) == "one"
    write(tmp_path, f"{OAUTH}=second")
    assert secret_of(file) == "second"


@pytest.mark.parametrize(
    "half", [f"{URL}=http://gate", f"{URL}='http://gate\n", f'{URL}="http://gate\n']
)
def test_half_a_line_is_waited_for(tmp_path: Path, half: str) -> None:
    """A line without its end, or its other quote, may be half a key or URL."""
    write(tmp_path, f"{KEY}=one\n{URL}=http://gateway.test\n")
    file = file_in(tmp_path, interval=0.3)
    assert secret_of(file) == "one"
    time.sleep(0.31)

    (tmp_path / ".env").write_text(f"{KEY}=second\n{half}")
    moment = time.time() - 0.15
    os.utime(tmp_path / ".env", (moment, moment))
    assert secret_of(file) == "one"
    time.sleep(0.31)

    assert secret_of(file) == "second"


def test_a_lost_base_url_is_a_lost_credential(tmp_path: Path) -> None:
    """A gateway's key goes to nobody else because a line is missing for a moment."""
    write(tmp_path, f"{KEY}=one\n{URL}=http://gateway.test\n")
    file = file_in(tmp_path, grace=1.0)
    assert secret_of(file) == "one"

    write(tmp_path, f"{KEY}=second\n")

    assert secret_of(file) == "one"
    time.sleep(1.1)
    assert secret_of(file) == "second"


def test_a_file_written_just_before_the_first_look_is_believed(tmp_path: Path) -> None:
    """There is nothing older to keep."""
    write(tmp_path, f"{OAUTH}=one")
    os.utime(tmp_path / ".env")

    assert secret_of(file_in(tmp_path)) == "one"


@pytest.mark.parametrize("content", [None, "", "# nothing\n"])
def test_a_lost_credential_is_kept_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    """A renewal may remove before it writes; a credential that stays away is gone."""
    write(tmp_path, f"{KEY}=one")
    file = file_in(tmp_path, grace=1.0)
    assert secret_of(file) == "one"

    (tmp_path / ".env").unlink()
    if content is not None:
        write(tmp_path, content)
    assert secret_of(file) == secret_of(file) == "one"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    time.sleep(1.1)
    assert file.current() is None


def test_a_lost_credential_that_comes_back_starts_anew(tmp_path: Path) -> None:
    """Each loss has its own while."""
    write(tmp_path, f"{KEY}=one")
    file = file_in(tmp_path, grace=60)
    assert secret_of(file) == "one"

    write(tmp_path, "")
    assert secret_of(file) == "one"
    write(tmp_path, f"{KEY}=second")
    assert secret_of(file) == "second"


@pytest.mark.parametrize("content", [b"\xff\xfe=", f"{KEY}=a b", f"{KEY}=a\n{URL}=x"])
def test_nonsense_changes_nothing_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | bytes
) -> None:
    """A file that cannot be used keeps the old value, with one warning."""
    write(tmp_path, f"{KEY}=one")
    file = file_in(tmp_path)
    assert secret_of(file) == "one"

    write(tmp_path, content)
    assert file.require().secret == secret_of(file) == "one"
    assert len(caplog.records) == 1
    assert "is kept" in caplog.text


def test_nonsense_at_the_start_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The error says what is wrong with the file, until it is mended."""
    (tmp_path / ".env").mkdir()
    file = file_in(tmp_path)

    with pytest.raises(CredentialsError, match="cannot read") as caught:
        file.require()
    assert file.current() is None
    assert "not a file of settings" in str(caught.value)
    assert len(caplog.records) == 1
    (tmp_path / ".env").rmdir()
    with pytest.raises(CredentialsError, match="no credential in"):
        file.require()


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    """What is no file of settings takes no memory."""
    with (tmp_path / ".env").open("wb") as file:
        file.truncate(2**30)

    with pytest.raises(CredentialsError, match="not a file of settings"):
        file_in(tmp_path).require()


def test_a_symlink_is_followed(tmp_path: Path) -> None:
    """Operators keep secrets elsewhere, and link to them."""
    (tmp_path / "secrets").mkdir()
    write(tmp_path / "secrets", f"\ufeff{KEY}=one")
    (tmp_path / ".env").symlink_to(tmp_path / "secrets" / ".env")

    assert secret_of(file_in(tmp_path)) == "one"


def test_no_log_record_has_a_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with the file, the log does not quote it."""
    caplog.set_level(logging.DEBUG)
    file = file_in(tmp_path)
    for text in ("sk-word", f"{KEY}=sk-word ü", f"{KEY}='sk-word", b"sk-word\xff"):
        write(tmp_path, text)
        file.current()

    assert caplog.records
    assert "sk-word" not in caplog.text
