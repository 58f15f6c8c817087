"""The API's credential, which stays on this host: where it is found, and how fresh.

Tokens expire daily, and something else renews them in ``.env``, in place or by rename,
while runs are live. So the file is looked at again, at most once per second, and what
is read of it is believed with care: a file that was written a moment ago may be half
written, and one without a credential may be about to get one.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import time
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import attrs
from dotenv.parser import parse_stream

from ._errors import CredentialsError

log = logging.getLogger(__name__)

Scheme = Literal["api-key", "oauth"]

#: An API key before OAuth, as NanoClaw has it.
_VARIABLES: Final[Mapping[str, Scheme]] = {
    "ANTHROPIC_API_KEY": "api-key",
    "CLAUDE_CODE_OAUTH_TOKEN": "oauth",
    "ANTHROPIC_AUTH_TOKEN": "oauth",
}
_BASE_URL: Final = "ANTHROPIC_BASE_URL"
_DEFAULT_BASE_URL: Final = "https://api.anthropic.com"
_PORTS: Final = {"http": 80, "https": 443}
#: What a header's value can hold; of Latin-1, credentials use ASCII.
_FIT: Final = re.compile(r"[!-~]+")
_FIT_PATH: Final = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_DOTS: Final = re.compile(r"/\.{1,2}(/|$)")

#: Seconds between two looks.
_INTERVAL: Final = 1.0
#: Seconds since its last change in which a file may be half written.
_SETTLING: Final = 0.1
#: Seconds for a file without a credential to get one again.
_GRACE: Final = 10.0
#: A larger file is no ``.env``.
_LARGEST_FILE: Final = 2**20


@attrs.frozen(kw_only=True)
class BaseUrl:
    """Where the API is.

    Attributes:
        scheme: ``http`` or ``https``.
        host: Its name or address; an IPv6 address has no brackets.
        port: Its port.
        path: What goes before each path; "" or "/…", without a slash at its end.
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@attrs.frozen(kw_only=True)
class Credential:
    """What the API wants to see, and where it goes.

    Attributes:
        scheme: ``api-key`` goes into ``x-api-key``, ``oauth`` into ``Authorization``.
        secret: The key or token. No repr has it.
        variable: The name of the variable that it is from.
        base_url: The API that it is for.
    """

    scheme: Scheme
    secret: str = attrs.field(repr=False)
    variable: str
    base_url: BaseUrl


def choose_credential(
    lines: Mapping[str, str], environment: Mapping[str, str]
) -> Credential | None:
    """Return the first credential of ``.env``, else of the environment.

    Raises:
        CredentialsError: If there is one that cannot be used.
    """
    url = lines.get(_BASE_URL) or environment.get(_BASE_URL) or _DEFAULT_BASE_URL
    for source in (lines, environment):
        for variable, scheme in _VARIABLES.items():
            # An empty variable is how a shell or a unit file unsets one.
            if secret := source.get(variable, "").strip():
                _check_secret(variable, secret)
                return Credential(
                    scheme=scheme,
                    secret=secret,
                    variable=variable,
                    base_url=_parse_base_url(url),
                )
    return None


def _check_secret(variable: str, secret: str) -> None:
    if not _FIT.fullmatch(secret):
        problem = f"{variable} has characters that no credential has"
        remedy = "Copy it again: it is one word of ASCII."
        raise CredentialsError(problem, remedy)


def _parse_base_url(text: str) -> BaseUrl:
    # The text is not quoted: it may have a password in it, or be one.
    remedy = f"Set it to the like of {_DEFAULT_BASE_URL}, or leave it out."
    try:
        parts = urlsplit(text.strip())
        port = parts.port or _PORTS.get(parts.scheme, 0)
        # A name that cannot be looked up is none.
        (parts.hostname or "").encode("idna")
    except ValueError:
        raise CredentialsError(f"{_BASE_URL} is not a URL", remedy) from None
    path = parts.path.rstrip("/")
    if parts.scheme not in _PORTS:
        problem = "does not begin with https:// or http://"
    elif not parts.hostname or not _FIT.fullmatch(parts.hostname):
        problem = "names no host"
    elif "@" in parts.netloc or parts.query or parts.fragment:
        problem = "has more than scheme, host, port and path"
    elif not _FIT_PATH.fullmatch(path) or _DOTS.search(path):
        problem = "has an unusual path"
    else:
        return BaseUrl(scheme=parts.scheme, host=parts.hostname, port=port, path=path)
    raise CredentialsError(f"{_BASE_URL} {problem}", remedy)


class CredentialFile:
    """The credential of ``root/.env``, else of the environment, as it is now.

    A file that cannot be read, or not understood, changes nothing, nor does one that
    was written this very moment. One that has lost its credential counts as such once
    it stays so for ten seconds. Each trouble is warned about once.

    Args:
        root: Where ``.env`` is.
        interval: Seconds between two looks at it, at least.
        grace: Seconds for a file that has lost its credential to get one again.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        interval: float = _INTERVAL,
        grace: float = _GRACE,
    ) -> None:
        self._path = Path(root, ".env")
        self._interval = interval
        self._grace = grace
        self._next_look = -1.0
        # The file as it was last read, and what of it is believed.
        self._stamp: tuple[int, int, int] | None = None
        self._known: Mapping[str, str] = {}
        self._lines: Mapping[str, str] = {}
        self._credential: Credential | None = None
        self._error: CredentialsError | None = None
        self._lost_since: float | None = None
        self._warned = ""

    def current(self) -> Credential | None:
        """Return the credential; None if there is none that can be used."""
        now = time.monotonic()
        if now >= self._next_look:
            self._look(now, first=self._next_look < 0)
        return self._credential

    def require(self) -> Credential:
        """Return the credential.

        Raises:
            CredentialsError: If there is none that can be used; says what to put where.
        """
        if self.current() is None:
            # With nothing to lose, even a file of this moment is believed.
            self._look(time.monotonic(), first=True)
        if self._credential is not None:
            return self._credential
        if self._error is not None:
            raise CredentialsError(self._error.problem, self._error.remedy)
        problem = f"no credential in {self._path} nor in the environment"
        raise CredentialsError(problem, f"Set one of {', '.join(_VARIABLES)}.")

    def _look(self, now: float, *, first: bool) -> None:
        self._next_look = now + self._interval
        try:
            lines = self._changed_lines(first=first)
            found = choose_credential(lines, os.environ)
        except (OSError, UnicodeDecodeError) as exc:
            # Not the error's own words: a decoder quotes what it could not read.
            reason = getattr(exc, "strerror", None) or "it is not UTF-8"
            problem = f"cannot read {self._path}: {reason}"
            self._keep(CredentialsError(problem, "Make it a readable text file."))
            return
        except CredentialsError as exc:
            self._keep(exc)
            return
        if self._has_lost(lines) and self._credential is not None:
            if self._lost_since is None:
                self._lost_since = now
            if now - self._lost_since < self._grace:
                self._warn(f"{self._path} has lost its credential, or its base URL")
                return
        self._lines, self._credential, self._error = lines, found, None
        self._lost_since, self._warned = None, ""

    def _has_lost(self, lines: Mapping[str, str]) -> bool:
        """Whether the credential is gone, or where it belongs: nowhere else."""
        had = any(map(self._lines.get, _VARIABLES))
        has = any(map(lines.get, _VARIABLES))
        return (had and not has) or bool(
            self._lines.get(_BASE_URL) and not lines.get(_BASE_URL)
        )

    def _keep(self, error: CredentialsError) -> None:
        self._error = error
        self._warn(str(error))

    def _warn(self, problem: str) -> None:
        if problem != self._warned:
            kept = "; the credential from before is kept" if self._credential else ""
            log.warning("%s%s", problem, kept)
        self._warned = problem

    def _changed_lines(self, *, first: bool) -> Mapping[str, str]:
        """Return what the file says; what it said before, if that may be half of it."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            self._stamp = None
            return {}
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp == self._stamp:
            return self._known
        if not first and 0 <= time.time() - status.st_mtime < _SETTLING:
            return self._lines
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            raise OSError(errno.EINVAL, "it is not a file of settings")
        text = self._path.read_text(encoding="utf-8-sig")
        bindings = list(parse_stream(StringIO(text)))
        is_whole = text.endswith("\n") and not any(line.error for line in bindings)
        age = time.time() - status.st_mtime
        if not first and not is_whole and 0 <= age < self._interval:
            # The last line may be half of a key, or of a URL: give it some time.
            return self._lines
        self._known = {
            line.key: line.value
            for line in bindings
            if line.key is not None and line.value is not None
        }
        self._stamp = stamp
        return self._known
