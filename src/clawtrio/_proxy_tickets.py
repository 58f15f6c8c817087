"""Tickets: what a run has in place of a credential, and what it has used it for."""

from __future__ import annotations

import hmac
import logging
import secrets
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import trio

from ._models import Usage
from ._proxy_rules import RefusedError
from ._proxy_usage import TOKENS

log = logging.getLogger(__name__)

_TOKEN_BYTES: Final = 32
#: Runs whose late requests can still be told from nobody's.
_REMEMBERED: Final = 100


class Ticket:
    """One run's right to use the proxy, for as long as the run lives.

    Attributes:
        group_folder: Whose run.
        run_id: Which run.
        token: What the run carries in place of a credential: good here, and nowhere
            else. No repr has it.
        is_live: Whether it is good.
        connections: Cancel scopes of its connections, which end with it.
        listeners: Cancel scopes of those who listen for it alone; likewise.
        tokens: The API's tokens that it was used for.
    """

    def __init__(
        self,
        group_folder: str,
        run_id: str,
        *,
        max_output_tokens: int | None,
        max_requests: int | None,
    ) -> None:
        self.group_folder = group_folder
        self.run_id = run_id
        self.token: Final = secrets.token_urlsafe(_TOKEN_BYTES)
        self.is_live = True
        self.connections: set[trio.CancelScope] = set()
        self.listeners: set[trio.CancelScope] = set()
        self.tokens: Counter[str] = Counter()
        self._max_output_tokens = max_output_tokens
        self._max_requests = max_requests
        self._requests = 0
        self._request_bytes = 0
        self._response_bytes = 0
        self._statuses: Counter[int] = Counter()
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"<Ticket of {self.group_folder} {self.run_id}>"

    @property
    def extra(self) -> dict[str, str]:
        """What each log record about this run has."""
        return {"group": self.group_folder, "run": self.run_id}

    @property
    def usage(self) -> Usage:
        """What was asked of the API so far."""
        return Usage(
            requests=self._requests,
            request_bytes=self._request_bytes,
            response_bytes=self._response_bytes,
            statuses=tuple(sorted(self._statuses.items())),
            **{name: self.tokens[name] for name in TOKENS},
        )

    def spend_request(self) -> None:
        """Take one request from the budget.

        Requests of the same moment see the same number of tokens, so together they may
        write more than is left.

        Raises:
            RefusedError: If there is nothing left.
        """
        for name, used, limit in (
            ("requests", self._requests, self._max_requests),
            ("output tokens", self.tokens["output_tokens"], self._max_output_tokens),
        ):
            if limit is not None and used >= limit:
                self.warn_once(f"the budget of {limit} {name} is used up")
                message = f"this run's budget of {limit} {name} is used up"
                raise RefusedError(429, "rate_limit_error", message)
        self._requests += 1

    def count_request_bytes(self, size: int) -> None:
        """Add what the client has sent of a body."""
        self._request_bytes += size

    def count_response_bytes(self, size: int) -> None:
        """Add what the client has got of a body."""
        self._response_bytes += size

    def count_status(self, status: int) -> None:
        """Add an answer."""
        self._statuses[status] += 1

    def warn_once(self, problem: str) -> None:
        """Log a warning about this run, the first time that it is given."""
        if problem not in self._said:
            self._said.add(problem)
            self._log(logging.WARNING, problem)

    def debug(self, message: str) -> None:
        """Log what happens to this run, for whoever wants to know."""
        self._log(logging.DEBUG, message)

    def _log(self, level: int, message: str) -> None:
        name = f"{self.group_folder} {self.run_id}"
        log.log(level, "[%s] %s", name, message, extra=self.extra)

    def end(self) -> None:
        """Be good no longer, and say what it was used for."""
        self.is_live = False
        for scope in self.connections | self.listeners:
            scope.cancel()
        self._log(logging.INFO, tell_usage(self.usage))


def tell_usage(used: Usage) -> str:
    """Say in one line what was used."""
    statuses = ", ".join(f"{count} x {status}" for status, count in used.statuses)
    return (
        f"{used.requests} API requests, {used.request_bytes} bytes up and "
        f"{used.response_bytes} down, answers: {statuses or 'none'}; "
        f"{used.input_tokens} tokens in, {used.cache_creation_input_tokens} to and "
        f"{used.cache_read_input_tokens} from the cache, {used.output_tokens} out"
    )


class TicketOffice:
    """Makes tickets, and knows the live ones."""

    def __init__(self) -> None:
        self._live: list[Ticket] = []
        self._dead: deque[Ticket] = deque(maxlen=_REMEMBERED)
        self._had_strangers = False

    @contextmanager
    def admit(
        self,
        group_folder: str,
        run_id: str,
        *,
        max_output_tokens: int | None,
        max_requests: int | None,
    ) -> Iterator[Ticket]:
        """Make a ticket that is good for as long as the block takes."""
        ticket = Ticket(
            group_folder,
            run_id,
            max_output_tokens=max_output_tokens,
            max_requests=max_requests,
        )
        self._live.append(ticket)
        try:
            yield ticket
        finally:
            self._live.remove(ticket)
            self._dead.append(ticket)
            ticket.end()

    def find(self, tokens: Sequence[bytes], expected: Ticket | None) -> Ticket | None:
        """Return the live ticket that one of *tokens* is of.

        Args:
            tokens: What the request carries.
            expected: The only one that is good here; None if each live one is.
        """
        good = self._live if expected is None else [expected]
        found = _match(tokens, good)
        if found is not None and found.is_live:
            return found
        late = expected or _match(tokens, self._dead)
        if late is not None:
            late.warn_once("a request without the token of a live run was refused")
        elif not self._had_strangers:
            self._had_strangers = True
            log.warning("a request with no run's token was refused")
        return None


def _match(tokens: Sequence[bytes], tickets: Sequence[Ticket]) -> Ticket | None:
    """Compare each with each, so that the time it takes tells nothing."""
    found = None
    for ticket in tickets:
        good = ticket.token.encode()
        for token in tokens:
            if hmac.compare_digest(token, good):
                found = ticket
    return found
