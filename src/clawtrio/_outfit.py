"""A group -> the container that a run of it starts: its mounts, and its way to the API.

What is opened on the way goes into a stack that the run holds to its end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeAlias

import attrs
import trio

from ._access import (
    PORT,
    Access,
    open_gateway,
    open_host,
    open_socket,
    tell,
)
from ._allowlist import AllowlistFile
from ._credentials import CredentialFile
from ._errors import RuntimeUnavailableError
from ._forbidden import Forbidden
from ._grants import Grants, WritableSources, grant_mounts
from ._groups import Places
from ._models import AdditionalMount, Group
from ._mounts import container_directory, hold_mounts
from ._process import hold_in_thread
from ._proxy import Proxy
from ._runtimes import (
    HOME,
    LABEL_ENGINE,
    LABEL_RUN,
    Container,
    ContainerSpec,
    Runtime,
)

log = logging.getLogger(__name__)

Logger: TypeAlias = logging.Logger | logging.LoggerAdapter[logging.Logger]
#: An address of the host, and the network device that has it.
Gateway: TypeAlias = tuple[str, str]


@attrs.frozen(kw_only=True)
class Outfit:
    """What a run needs before it can start.

    Attributes:
        spec: Its container.
        refused: The additional mounts that it does not get, each with the reason.
        access: Its way to the API, if its agent knows of one.
    """

    spec: ContainerSpec
    refused: tuple[tuple[AdditionalMount, str], ...]
    access: Access | None


class Outfitter:
    """Fits out the runs of one engine.

    Args:
        places: Where things are.
        runtime: What will run the containers.
        proxy: Where agents find the API.
        credentials: What the proxy has for it.
        labels: The engine's, which are in those of each container.
        serve: Has the proxy serve a run by a listener.
        check_open: Raises if the engine is closed, and its places with it.
    """

    def __init__(
        self,
        *,
        places: Places,
        runtime: Runtime,
        proxy: Proxy,
        credentials: CredentialFile,
        labels: Mapping[str, str],
        serve: Callable[[Access, trio.SocketListener], object],
        check_open: Callable[[], object],
    ) -> None:
        self._settings = places.settings
        self._places = places
        self._runtime = runtime
        self._proxy = proxy
        self._credentials = credentials
        self._serve = serve
        self._check_open = check_open
        self._labels = labels
        forbidden = Forbidden(places.settings, fixed=[str(container_directory())])
        self._forbidden = forbidden
        self._allowlist = AllowlistFile(places.settings, forbidden)
        self._writable = WritableSources()

    async def fit_out(
        self, group: Group, run_id: str, logger: Logger, stack: ExitStack
    ) -> Outfit:
        """Make what a run of *group* needs.

        Raises:
            CredentialsError: If its agent needs a credential, and there is none.
            RuntimeUnavailableError: If its container could not reach the proxy.
            UnsafePathError: If a place on the host cannot be trusted.
            OSError: If something cannot be made.
        """
        if self._talks_to_api and self._settings.agent_command is None:
            self._credentials.require()
        granted, refused = await self._grant_soon(group, logger, stack)
        gateway = await self._find_gateway()
        self._check_open()
        access = self._open_access(group, run_id, gateway, stack)
        if access is not None and access.listener is not None:
            self._serve(access, access.listener)
        spec = self._specify(group, run_id, (granted, refused), access, stack)
        return Outfit(spec=spec, refused=tuple(refused), access=access)

    async def plan(self, group: Group, stack: ExitStack) -> ContainerSpec:
        """Say what container a run of *group* would start; there will be none.

        Raises:
            RuntimeUnavailableError: If its container could not reach the proxy.
            UnsafePathError: If a place on the host cannot be trusted.
            OSError: If something cannot be made.
        """
        self._check_open()
        run_id = "0" * 12
        grants = self._grant(group, log, stack)
        gateway = await self._find_gateway()
        self._check_open()
        access = self._open_access(group, run_id, gateway, stack)
        if access is not None and access.listener is not None:
            stack.callback(access.listener.socket.close)
        return self._specify(group, run_id, grants, access, stack)

    def open_port(
        self, outfit: Outfit
    ) -> Callable[[Container], Awaitable[object]] | None:
        """Return what opens the proxy's port in a container that must have one."""
        access = outfit.access
        if access is None or access.listener is not None:
            return None

        async def open_port(container: Container) -> None:
            self._serve(access, await container.listen(PORT))

        return open_port

    @property
    def _talks_to_api(self) -> bool:
        settings = self._settings
        return settings.agent_command is not None or settings.agent != "echo"

    @property
    def _arguments(self) -> tuple[str, ...]:
        """What our runner is told; nothing where an image's own agent is run."""
        if self._settings.agent_command is not None:
            # A foreign image starts that by our runner, too.
            return ("--", *self._settings.agent_command)
        return (self._settings.agent,) if self._runtime.takes_runner else ()

    async def _grant_soon(
        self, group: Group, logger: Logger, stack: ExitStack
    ) -> Grants:
        """Hold what is granted of the group's wishes; where it hangs, nothing is."""
        requests = group.container_config.additional_mounts
        grant = partial(self._grant, group, logger)
        if self._runtime.in_process or not requests:
            granted, refused = grant(stack)
        else:
            seconds = self._settings.command_timeout
            problem = f"could not be looked at within {seconds:g} s"
            granted, refused = [], [(request, problem) for request in requests]
            with trio.move_on_after(seconds):
                granted, refused = await hold_in_thread(grant, stack)
        for _, reason in refused:
            logger.warning("additional mount refused: %s", reason)
        return granted, refused

    def _grant(self, group: Group, logger: Logger, stack: ExitStack) -> Grants:
        requests = group.container_config.additional_mounts
        if not requests:
            return [], []
        return grant_mounts(
            requests,
            is_main=group.is_main,
            allowlist=self._allowlist,
            forbidden=self._forbidden,
            writable=self._writable,
            compares=self._runtime.compares_mounts,
            stack=stack,
            logger=logger,
        )

    async def _find_gateway(self) -> Gateway | None:
        """Tell where an image that knows only a URL finds the host, if anywhere."""
        # Root opens the port inside, where the host's other users cannot reach it.
        wanted = not self._arguments and self._settings.network == "open"
        if not wanted or os.geteuid() == 0:
            return None
        with suppress(RuntimeUnavailableError):
            return await self._runtime.gateway(self._labels)
        # Then its port can be opened inside, or that says what stands in the way.
        return None

    def _open_access(
        self, group: Group, run_id: str, gateway: Gateway | None, stack: ExitStack
    ) -> Access | None:
        """Give a run its way to the API; None if its agent does not know of one."""
        settings = self._settings
        if not self._talks_to_api:
            return None
        ticket = stack.enter_context(
            self._proxy.admit(
                group.folder,
                run_id,
                max_output_tokens=settings.max_output_tokens,
                max_requests=settings.max_requests,
            )
        )
        access = tell(ticket, self._credentials.current())
        if settings.proxy_host is not None and settings.network == "open":
            return open_host(access, settings.proxy_host)
        if self._arguments:
            name = f"{self._labels[LABEL_ENGINE]}-{run_id}"
            return open_socket(access, self._places, name, stack)
        if gateway is not None:
            return open_gateway(access, *gateway)
        # An image that knows only a URL: its port is opened once it runs.
        return access

    def _specify(
        self,
        group: Group,
        run_id: str,
        grants: Grants,
        access: Access | None,
        stack: ExitStack,
    ) -> ContainerSpec:
        settings, places = self._settings, self._places
        mounts = stack.enter_context(
            hold_mounts(
                places, group, self._forbidden, own_runner=bool(self._arguments)
            )
        )
        if access is not None and access.mount is not None:
            mounts += (access.mount,)
        environment = {
            "TZ": settings.timezone,
            "HOME": HOME,
            "LANG": "C.UTF-8",
            **settings.agent_env,
            **self._for_claude(),
        }
        return ContainerSpec(
            name=f"clawtrio-{group.folder}-{run_id}",
            labels={**self._labels, LABEL_RUN: run_id},
            mounts=(*mounts, *grants[0]),
            environment={**environment, **(access.environment if access else {})},
            hidden=access.hidden if access else frozenset(),
            arguments=self._arguments,
            uid=places.owner.uid,
            gid=places.owner.gid,
            memory=settings.memory,
            cpus=settings.cpus,
            pids=settings.pids,
            network="open" if settings.network == "open" else "none",
        )

    def _for_claude(self) -> dict[str, str]:
        """Return what our backend for Claude reads of the settings."""
        settings = self._settings
        variables = {}
        if self._arguments == ("claude",):
            if settings.model is not None:
                variables["CLAWTRIO_MODEL"] = settings.model
            if settings.partial_text:
                variables["CLAWTRIO_PARTIAL_TEXT"] = "1"
        return variables
