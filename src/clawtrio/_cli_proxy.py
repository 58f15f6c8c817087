"""``clawtrio proxy``: the credential proxy alone, for agents that others run."""

from __future__ import annotations

import ipaddress
from functools import partial

import trio

from ._cli_runs import UsageError
from ._cli_terminal import Interrupts, note, write
from ._credentials import CredentialFile
from ._proxy import open_proxy
from ._proxy_tickets import tell_usage
from ._settings import Settings


async def serve_proxy(
    settings: Settings, host: str, port: int, interrupts: Interrupts
) -> int:
    """Serve until a signal comes; print where and with which token, then the usage."""
    credentials = CredentialFile(settings.root)
    credential = credentials.require()
    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"cannot listen on {host}, port {port}: {exc}") from None
    address, port = listeners[0].socket.getsockname()[:2]
    if not ipaddress.ip_address(address).is_loopback:
        note(f"warning: {address} can be reached from other machines, too")
    shown = f"[{address}]" if ":" in address else address
    over = trio.Event()
    interrupts.stop = over.set
    async with open_proxy(credentials, paths=settings.proxy_paths) as proxy:
        with proxy.admit(
            "proxy",
            "alone",
            max_output_tokens=settings.max_output_tokens,
            max_requests=settings.max_requests,
        ) as ticket:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    serve = partial(proxy.serve, listener, ticket=ticket)
                    await nursery.start(serve)
                where = f"ANTHROPIC_BASE_URL=http://{shown}:{port}"
                write(f"{where} ANTHROPIC_API_KEY={ticket.token}\n")
                base = f"{credential.base_url.scheme}://{credential.base_url.authority}"
                note(f"for {base}, by {credential.variable}; Ctrl-C ends it")
                await over.wait()
                nursery.cancel_scope.cancel()
    write(f"{tell_usage(ticket.usage)}\n")
    return 0
