"""The credential proxy: HTTP for agents, in which their token becomes the credential.

The real credential never leaves this process but to the API. What a container has is
the token of its run, a word that means nothing elsewhere and dies with the run. How a
container's requests come here is not our business: we are given listeners.
"""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractContextManager, asynccontextmanager

import trio

from ._proxy_client import ClientConnection, Credentials, Service
from ._proxy_rules import ProxyLimits, choose_routes, fit_limits
from ._proxy_tickets import Ticket, TicketOffice
from ._proxy_upstream import Upstream

log = logging.getLogger(__name__)


class Proxy:
    """Made by :func:`open_proxy`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._serving: set[trio.CancelScope] = set()
        self._connections = 0
        self._was_full = False

    def admit(
        self,
        group_folder: str,
        run_id: str,
        *,
        max_output_tokens: int | None = None,
        max_requests: int | None = None,
    ) -> AbstractContextManager[Ticket]:
        """Let a run use the proxy for as long as the block takes.

        What is still open at its end is cut off.

        Args:
            group_folder: Whose run, for the log.
            run_id: Which run, for the log.
            max_output_tokens: How many tokens the API may write for it; requests of the
                same moment may exceed it together.
            max_requests: How many requests it may make.
        """
        return self._service.office.admit(
            group_folder,
            run_id,
            max_output_tokens=max_output_tokens,
            max_requests=max_requests,
        )

    async def serve(
        self,
        listener: trio.abc.Listener[trio.SocketStream],
        *,
        ticket: Ticket | None = None,
        task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve those who connect, until cancelled; closes the listener.

        Args:
            listener: Where they connect.
            ticket: The run that it is for: no other one's token is good there, and it
                is served for as long as the ticket is good. None serves all runs.
            task_status: Told once it is served.
        """

        async def handle(stream: trio.SocketStream) -> None:
            if not self._has_room(ticket):
                await trio.aclose_forcefully(stream)
                return
            self._connections += 1
            try:
                await ClientConnection(stream, self._service, ticket).run()
            except Exception:
                # What a client or the API can bring about here ends its connection, and
                # not the bot. It is a bug of ours all the same.
                extra = ticket.extra if ticket else None
                log.exception(
                    "a connection to the credential proxy failed", extra=extra
                )
            finally:
                self._connections -= 1

        owners = (
            [self._serving] if ticket is None else [self._serving, ticket.listeners]
        )
        with trio.CancelScope() as scope:
            for owner in owners:
                owner.add(scope)
            if ticket is not None and not ticket.is_live:
                scope.cancel()
            try:
                await trio.serve_listeners(handle, [listener], task_status=task_status)
            finally:
                for owner in owners:
                    owner.remove(scope)

    def _has_room(self, ticket: Ticket | None) -> bool:
        limits = self._service.limits
        if ticket and len(ticket.connections) >= limits.max_connections_per_run:
            ticket.warn_once("it has too many connections")
            return False
        is_full = self._connections >= limits.max_connections
        if is_full and not self._was_full:
            log.warning("the credential proxy has %s connections", self._connections)
        self._was_full = is_full
        return not is_full

    def close(self) -> None:
        """Serve nobody any more."""
        for scope in self._serving:
            scope.cancel()


@asynccontextmanager
async def open_proxy(
    credentials: Credentials,
    *,
    paths: Iterable[str] | None = None,
    limits: ProxyLimits | None = None,
) -> AsyncIterator[Proxy]:
    """Open the credential proxy; it has tasks only where it is asked to serve.

    Args:
        credentials: Where the credential is from, such as a
            :class:`~clawtrio._credentials.CredentialFile`; looked at for each request.
        paths: API paths that may be called, in place of those that the Claude CLI
            needs.
        limits: How much it takes, and how long it waits; by default what fits the
            descriptors that this process may have.

    Raises:
        SettingsError: If one of *paths* can never be allowed.
    """
    if limits is None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = soft == resource.RLIM_INFINITY
        limits = fit_limits(ProxyLimits(), math.inf if unlimited else soft)
    service = Service(
        credentials=credentials,
        office=TicketOffice(),
        upstream=Upstream(limits),
        routes=choose_routes(paths),
        limits=limits,
    )
    proxy = Proxy(service)
    try:
        yield proxy
    finally:
        proxy.close()
        await service.upstream.aclose()  # noqa: ASYNC102 - shields itself
