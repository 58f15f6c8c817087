"""Our credential proxy, as a process of its own.

``python proxy_ours.py UPSTREAM_PORT`` listens on a port of its own, and prints that and
what it wants to see for a key.
"""

from __future__ import annotations

import sys

import trio

from clawtrio._credentials import BaseUrl, Credential
from clawtrio._proxy import open_proxy
from clawtrio._proxy_rules import ProxyLimits

REAL_KEY = "the-real-key"


async def main(upstream_port: int) -> None:
    """Serve until killed."""
    base = BaseUrl(scheme="http", host="127.0.0.1", port=upstream_port, path="")
    credential = Credential(
        scheme="api-key", secret=REAL_KEY, variable="", base_url=base
    )

    class Fixed:
        def current(self) -> Credential:
            return credential

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    # All its clients are one run.
    limits = ProxyLimits(max_connections_per_run=1000)
    async with open_proxy(Fixed(), limits=limits) as proxy:
        with proxy.admit("bench", "0") as ticket:
            print(listener.socket.getsockname()[1], ticket.token, flush=True)
            await proxy.serve(listener)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
