"""Containers run by Docker or Podman.

One class serves both: how they differ is data, a :class:`Flavour`. A container that is
gone is what we wanted, so it is never an error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import resource
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

import trio

from ._docker_conmon import end_monitor
from ._errors import NotStartedError, RuntimeUnavailableError, UnsafePathError
from ._flavours import HINT, Answer, EngineInfo, Flavour, ask, tidy
from ._hostfs import check_mountable
from ._netns import cannot_listen, listen_inside, open_network_of
from ._process import ClientProcess, client_environment, in_thread, spawn
from ._runtimes import (
    HOME,
    LABEL_ENGINE,
    LABEL_ROOT,
    LABEL_RUN,
    RUN_CLAWTRIO,
    RUNNER,
    WORKSPACE_GROUP,
    ContainerSpec,
    FoundContainer,
    HeldMount,
)

log = logging.getLogger("clawtrio.docker")

LABEL_PROTOCOL: Final = "clawtrio.protocol"
PROTOCOL: Final = "1"
#: Which agent is in an image of ours, besides what needs nothing.
LABEL_AGENT: Final = "clawtrio.agent"

#: Enough for an agent's tools, below what hosts allow: raising a hard limit fails.
_OPEN_FILES: Final = 16384
# No container runs sooner, and each look costs 15 to 30 ms of a processor.
_FIRST_LOOK: Final = 0.1
_LOOK_AGAIN: Final = 0.02
_LOOK_SELDOM: Final = 0.5
#: How long after its container a client may still be there.
_LEAVING: Final = 1.0

#: What the client exits with when it, or the init, starts nothing.
_FAILED: Final = frozenset({1, 125, 126, 127})
_GONE: Final = re.compile(
    r"no such container|no container with|is not running|only kill running"
    r"|is already in progress",
    re.IGNORECASE,
)
_NO_IMAGE: Final = re.compile(r"no such image|image not known", re.IGNORECASE)
_NO_NETWORK: Final = re.compile(r"not found|no such network", re.IGNORECASE)
#: What may be in a client's environment for the agent. None of our clients obeys such.
_HIDEABLE: Final = re.compile(
    r"(?:ANTHROPIC|CLAUDE|CLAWTRIO)_\w+"
    r"|(?!DOCKER_|CONTAINERS?_|OTEL_)[A-Z]\w*_(?:KEY|TOKEN|SECRET)"
)
_FAR_PROXY: Final = (
    "containers of this {} are not on this host, and cannot reach the credential"
    " proxy: use an engine that is, or set CLAWTRIO_NETWORK to open and"
    " CLAWTRIO_PROXY_HOST to an address of this host that they reach"
)
_CLOSED: Final = "Leave CLAWTRIO_NETWORK at proxy."
_OWN_MESSAGE: Final = re.compile(r"(?:docker|Error|crun|runc): (.*)")
#: The init's, where the image lacks the program. Catatonit then leaves with 1.
_INIT_MESSAGE: Final = re.compile(
    r"(?:\[FATAL tini \(\d+\)\]|ERROR \(catatonit:\d+\):) (.*exec .*)"
)


class DockerRuntime:
    """Run containers by Docker's command line, or one that is like it.

    Args:
        flavour: Whose.
        image: What containers are made of.
        agent: The agent that must be in it, if it is ours; by its label.
    """

    in_process: Final = False

    def __init__(
        self, flavour: Flavour, *, image: str, agent: str | None = None
    ) -> None:
        self._flavour = flavour
        self._image = image
        self._agent = agent
        # Until check() knows better: our own image is held more strictly.
        self._engine = EngineInfo()
        self.takes_runner = True
        self.compares_mounts = True

    @property
    def name(self) -> str:
        return self._flavour.name

    @property
    def needs_labels(self) -> bool:
        """Whether the operator has to label what is mounted, for SELinux."""
        return self._engine.selinux and not self._flavour.relabel

    async def check(self) -> None:
        engine = self._read_info(await self._ask("info", "--format", "{{json .}}"))
        if not engine.seccomp:
            problem = "its containers run without a seccomp filter"
            remedy = "Start the engine with its default seccomp profile."
            raise self._flavour.unavailable(problem, remedy)
        argv = ["image", "inspect", "--format", "{{json .Config.Labels}}", self._image]
        answer = await self._ask(*argv)
        build = f"Build it: clawtrio image build --runtime {self.name}"
        if answer.code:
            if not _NO_IMAGE.search(answer.stderr):
                raise self._flavour.unavailable(answer.message)
            raise self._flavour.unavailable(f"there is no image {self._image!r}", build)
        try:
            labels = json.loads(answer.stdout) or {}
            protocol, agent = labels.get(LABEL_PROTOCOL), labels.get(LABEL_AGENT)
        except (ValueError, AttributeError) as exc:
            raise self._not_understood("image inspect") from exc
        if protocol not in (None, PROTOCOL):
            problem = (
                f"image {self._image!r} has protocol {protocol!r}, not {PROTOCOL!r}"
            )
            raise self._flavour.unavailable(problem, build)
        if protocol is not None and self._agent not in (None, agent):
            problem = f"image {self._image!r} is without the agent {self._agent!r}"
            raise self._flavour.unavailable(problem, build)
        if not engine.limits:
            log.warning(
                "%s: containers' memory and processes are not limited", self.name
            )
        self._engine = engine
        self.takes_runner = protocol is not None
        self.compares_mounts = engine.local and await self._is_here()

    def argv(self, spec: ContainerSpec) -> list[str]:
        """Say how the client is called for *spec*.

        Raises:
            UnsafePathError: If a path is one that the runtimes misread.
            NotStartedError: If a value is to be hidden that would change the client.
        """
        flavour, engine = self._flavour, self._engine
        argv = [self.name, "run", "-i", "--rm", "--init", "--name", spec.name]
        for name, value in spec.labels.items():
            argv += ["--label", f"{name}={value}"]
        argv += ["--user", f"{spec.uid}:{spec.gid}", "--cap-drop", "ALL"]
        argv += ["--security-opt", "no-new-privileges", "--ipc", "private"]
        argv += ["--memory", f"{spec.memory}", "--memory-swap", f"{spec.memory}"]
        # Docker refuses to promise more processors than there are.
        argv += ["--cpus", f"{min(spec.cpus, engine.processors):g}"]
        argv += ["--pids-limit", f"{spec.pids}", "--ulimit", "core=0:0"]
        argv += ["--ulimit", f"nofile={_open_files()}:{_open_files()}"]
        network = "none" if spec.network == "none" else self._network(spec.labels)
        argv += ["--log-driver", "none", "--network", network, "--pull", "never"]
        argv += ["--stop-signal", "SIGTERM", "--workdir", WORKSPACE_GROUP]
        argv += ["--no-healthcheck", *flavour.options]
        if os.geteuid() != 0:
            argv += flavour.rootless_options
        if self.takes_runner:
            # They count as the agent's memory: half lets it survive a full one.
            tmpfs = f"{flavour.tmpfs},size={spec.memory // 2},mode="
            owned = flavour.tmpfs_owned.format(uid=spec.uid, gid=spec.gid)
            argv += ["--read-only", "--tmpfs", f"/tmp:{tmpfs}1777"]  # noqa: S108
            argv += ["--tmpfs", f"{HOME}:{tmpfs}0700,{owned}"]
        environment = {**dict.fromkeys(flavour.silenced, ""), **spec.environment}
        hidden = _hidden(spec)
        for name, value in environment.items():
            argv += ["-e", name if name in hidden else f"{name}={value}"]
        for held in spec.mounts:
            source, target = held.mount.host_path, held.mount.container_path
            check_mountable(source)
            check_mountable(target)
            option = ["type=bind", f"source={source}", f"target={target}"]
            option += [engine.nonrecursive, *["readonly"][: held.mount.readonly]]
            if engine.selinux and held.relabel:
                option += flavour.relabel
            line = io.StringIO()
            csv.writer(line, lineterminator="").writerow(option)
            argv += ["--mount", line.getvalue()]
        if self.takes_runner or spec.arguments:
            argv += ["--entrypoint", "python3", self._image, RUNNER]
            return [*argv, *spec.arguments]
        return [*argv, self._image]

    async def start(self, spec: ContainerSpec) -> DockerContainer:
        argv = self.argv(spec)
        targets = {held.mount.container_path for held in spec.mounts}
        if RUN_CLAWTRIO in targets and not self.compares_mounts:
            raise NotStartedError(_FAR_PROXY.format(self.name))
        environment = {**client_environment(), **_hidden(spec)}
        if spec.network == "none" or not self._flavour.network_per_run:
            process = await spawn(argv, environment=environment)
            return DockerContainer(self._flavour, spec, process)
        try:
            async with self._new_network(spec.labels) as network:
                process = await spawn(argv, environment=environment)
        except RuntimeUnavailableError as exc:
            raise NotStartedError(str(exc)) from exc
        return DockerContainer(self._flavour, spec, process, network=network)

    async def open_network(self, labels: Mapping[str, str]) -> None:
        flavour = self._flavour
        if flavour.network_needs_root and os.geteuid() != 0:
            problem = "an open network was never tried here by an ordinary user"
            raise flavour.unavailable(problem, f"Run the bot as root. {_CLOSED}")
        if not self._engine.isolates:
            problem = "its network backend cannot keep containers apart"
            raise flavour.unavailable(problem, f"Have it use netavark. {_CLOSED}")
        if flavour.network_per_run:
            return
        async with self._new_network(labels):
            # Only now: the engine may have had to load what filters bridges.
            self._check_filter()

    async def close_network(self, labels: Mapping[str, str]) -> None:
        argv = ["network", "ls", "-q"]
        for name in (LABEL_ROOT, LABEL_ENGINE):
            argv += ["--filter", f"label={name}={labels[name]}"]
        answer = await self._ask(*argv)
        if answer.code:
            raise self._flavour.unavailable(answer.message)
        failure = ""
        for network in answer.stdout.split():
            failure = await _remove_network(self._flavour, network) or failure
        if failure:
            raise self._flavour.unavailable(failure)

    async def gateway(self, labels: Mapping[str, str]) -> tuple[str, str]:
        if self._flavour.network_per_run:
            problem = "a container's network has no gateway before it runs"
            raise self._flavour.unavailable(problem, f"Run as root. {_CLOSED}")
        name = self._network(labels)
        template = "{{(index .IPAM.Config 0).Gateway}}"
        answer = await self._ask("network", "inspect", "--format", template, name)
        if answer.code:
            raise self._flavour.unavailable(answer.message)
        return answer.stdout.strip(), name

    def _check_filter(self) -> None:
        """Make sure that what keeps containers apart is at work, where we can see it.

        Raises:
            RuntimeUnavailableError: If not.
        """
        sysctl = self._flavour.network_sysctl
        if self.compares_mounts and not _is_set(sysctl):
            problem = f"containers would reach each other, since {sysctl} is not 1"
            remedy = f"Set it to 1 (modprobe br_netfilter). {_CLOSED}"
            raise self._flavour.unavailable(problem, remedy)

    def _network(self, labels: Mapping[str, str]) -> str:
        """Name a network and its bridge; Linux has room for 15 characters."""
        names = (LABEL_ROOT, LABEL_ENGINE, LABEL_RUN)
        whose = [labels[name] for name in names[: 2 + self._flavour.network_per_run]]
        return f"ct-{hashlib.sha256(json.dumps(whose).encode()).hexdigest()[:12]}"

    async def _create_network(self, name: str, labels: Mapping[str, str]) -> None:
        argv = ["network", "create"]
        argv += [option.format(name=name) for option in self._flavour.network_options]
        argv += [f"--label={label}={value}" for label, value in labels.items()]
        answer = await self._ask(*argv, name)
        if answer.code:
            remedy = f"Remove networks that nobody uses (network prune). {_CLOSED}"
            raise self._flavour.unavailable(answer.message, remedy)

    @asynccontextmanager
    async def _new_network(self, labels: Mapping[str, str]) -> AsyncIterator[str]:
        """Create a network, and remove it again only if something fails."""
        name = self._network(labels)
        try:
            await self._create_network(name, labels)
            yield name
        except BaseException:
            with trio.move_on_after(_LEAVING, shield=True):
                await _remove_network(self._flavour, name)
            raise

    async def find(self, labels: Mapping[str, str]) -> Sequence[FoundContainer]:
        names = sorted({LABEL_ROOT, LABEL_ENGINE, LABEL_RUN, *labels})
        fields = [".ID", *(f"({self._flavour.label.format(name)})" for name in names)]
        # An array a line: the value of one label is never taken for another label.
        template = ",".join(f"{{{{json {field}}}}}" for field in fields)
        argv = ["ps", "-a", "--no-trunc", "--format", f"[{template}]"]
        for name, value in labels.items():
            argv += ["--filter", f"label={name}={value}"]
        answer = await self._ask(*argv)
        if answer.code:
            raise self._flavour.unavailable(answer.message)
        found = []
        try:
            for line in answer.stdout.splitlines():
                container_id, *values = json.loads(line)
                theirs = {k: v for k, v in zip(names, values, strict=True) if v}
                if labels.items() <= theirs.items():
                    found.append(FoundContainer(container_id, theirs))
        except (ValueError, TypeError) as exc:
            raise self._not_understood("ps") from exc
        return found

    async def remove(self, container_id: str) -> None:
        *before, remove = self._flavour.remove
        for command in before:
            await self._ask(*command, container_id)
        answer = await self._ask(*remove, container_id)
        if answer.code and not _GONE.search(answer.stderr):
            raise self._flavour.unavailable(answer.message)
        if self._flavour.forgets and not await end_monitor(container_id):
            problem = f"conmon of {container_id} does not end"
            raise self._flavour.unavailable(problem)

    async def _ask(self, *arguments: str) -> Answer:
        try:
            return await ask([self.name, *arguments])
        except NotStartedError as exc:
            raise self._flavour.unavailable(str(exc), self._flavour.install) from exc

    def _read_info(self, answer: Answer) -> EngineInfo:
        # An old Docker client tells of its trouble here, with code 0.
        trouble = re.search(r'"ServerErrors":\["((?:[^"\\]|\\.)*)', answer.stdout)
        if answer.code or trouble:
            message = tidy(trouble[1]) if trouble else answer.message
            raise self._flavour.unavailable(message)
        try:
            return self._flavour.read_info(json.loads(answer.stdout))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise self._not_understood("info") from exc

    async def _is_here(self) -> bool:
        """Tell whether the engine is asked through a socket of this host."""
        if not self._flavour.endpoint:
            return True
        answer = await self._ask(*self._flavour.endpoint)
        return answer.stdout.startswith("unix://")

    def _not_understood(self, command: str) -> RuntimeUnavailableError:
        problem = f"what '{self.name} {command}' answers is not understood"
        remedy = (
            "Is it podman under docker's name? Then set CLAWTRIO_RUNTIME to podman."
        )
        return self._flavour.unavailable(problem, remedy)


class DockerContainer:
    """A started container, and the client that holds its pipes."""

    def __init__(
        self,
        flavour: Flavour,
        spec: ContainerSpec,
        process: ClientProcess,
        *,
        network: str | None = None,
    ) -> None:
        self._flavour = flavour
        self._spec = spec
        self._process = process
        # What is to be removed along with the container.
        self._network = network
        self._seen: tuple[str, int] | None = None
        self.stdin: trio.abc.SendStream = process.stdin
        self.stdout: trio.abc.ReceiveStream = process.stdout
        self.stderr: trio.abc.ReceiveStream = process.stderr

    @property
    def process(self) -> int | None:
        if self._seen is None:
            return None
        try:
            with _held_process(*self._seen):
                return self._seen[1]
        except OSError:
            return None

    async def verify(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_for, nursery.cancel_scope)
            await self._process.wait()
            nursery.cancel_scope.cancel()
        if self._seen is None:
            return
        mounts = self._spec.mounts
        replaced, unread = await in_thread(
            partial(_compare_mounts, *self._seen, mounts), abandon_on_cancel=True
        )
        if unread:
            log.debug("%s: mounts not compared: %s", self._spec.name, unread)
        if replaced is not None:
            problem = "another place was mounted: replaced while the container started"
            raise UnsafePathError(replaced.mount.host_path, problem)
        doubtful = [held for held in mounts if unread and held.replaceable]
        if doubtful:
            with trio.move_on_after(_LEAVING):
                # It may be that the container has just left: that harms nobody.
                await self._process.wait()
                return
            problem = f"cannot be compared with what was mounted: {unread}"
            raise UnsafePathError(doubtful[0].mount.host_path, problem)

    async def _look_for(self, done: trio.CancelScope) -> None:
        """Set what was seen of the container, once it runs."""
        argv = ["container", "inspect", "--format"]
        argv += ["{{.Id}} {{.State.Pid}} {{.State.Running}}", self._spec.name]
        await trio.sleep(_FIRST_LOOK)
        pause = _LOOK_AGAIN
        while True:
            answer = await self._ask(argv)
            if match := re.match(r"(\w{12,}) (\d+) true$", answer.stdout):
                self._seen = match[1], int(match[2])
                done.cancel()
                return
            await trio.sleep(pause)
            pause = min(pause * 1.2, _LOOK_SELDOM)

    async def listen(self, port: int) -> trio.SocketListener:
        with ExitStack() as held:
            try:
                if self._seen is None:
                    raise ProcessLookupError("it does not run")
                process = held.enter_context(_held_process(*self._seen))
                network = open_network_of(process)
            except OSError as exc:
                raise cannot_listen(self._flavour.name, port, exc) from exc
            held.callback(os.close, network)
            return await listen_inside(self._flavour.name, network, port)

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        await self._order("stop", "-t", f"{math.ceil(grace)}")

    async def kill(self) -> None:
        await self._order("kill")

    async def _order(self, *arguments: str) -> None:
        """Tell the engine; failing is a warning, since who calls looks after it."""
        answer = await self._ask([*arguments, self._spec.name])
        if answer.code and not _GONE.search(answer.stderr):
            name, order, message = self._spec.name, arguments[0], answer.message
            log.warning("%s: %s failed: %s", name, order, message)

    async def _ask(self, arguments: list[str]) -> Answer:
        try:
            return await ask([self._flavour.name, *arguments])
        except NotStartedError as exc:
            return Answer(code=127, stdout="", stderr=str(exc))

    def kill_client(self) -> None:
        self._process.kill()

    def start_failure(self, exit_code: int, stderr: str) -> str | None:
        # Neither the client nor an init ends otherwise; an agent may quote them.
        if exit_code not in _FAILED:
            return None
        lines = [line for line in stderr.splitlines() if line.strip()]
        for match in filter(None, map(_INIT_MESSAGE.match, lines)):
            return tidy(match[1])
        if exit_code == 1 or self._seen is not None:
            return None
        for match in filter(None, map(_OWN_MESSAGE.match, lines)):
            return tidy(match[1])
        # Of an option that it does not know, Docker complains without its name.
        return tidy(lines[0]) if any(map(HINT.match, lines)) else None

    async def aclose(self) -> None:
        try:
            if self._network is not None:
                # A container that is still there keeps it, for close_network().
                problem = await _remove_network(self._flavour, self._network)
                log.debug("%s: network: %s", self._spec.name, problem or "removed")
        finally:
            await self._process.aclose()


def _hidden(spec: ContainerSpec) -> dict[str, str]:
    """Return what the client gets for the agent in its own environment.

    Raises:
        NotStartedError: If it might do something to the client.
    """
    hidden = {n: value for n, value in spec.environment.items() if n in spec.hidden}
    for name in hidden:
        if not _HIDEABLE.fullmatch(name):
            raise NotStartedError(f"{name} cannot be hidden: a client may obey it")
    return hidden


def _is_set(sysctl: str) -> bool:
    try:
        return Path(sysctl).read_text().strip() == "1"
    except OSError:
        return False


async def _remove_network(flavour: Flavour, network: str) -> str:
    """Remove a network that is not used; return why not, or nothing."""
    try:
        answer = await ask([flavour.name, "network", "rm", network])
    except NotStartedError as exc:
        return str(exc)
    if answer.code and not _NO_NETWORK.search(answer.stderr):
        return answer.message
    return ""


def _open_files() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)


@contextmanager
def _held_process(container_id: str, pid: int) -> Iterator[int]:
    """Hold the directory in /proc of a container's process, and of no other.

    Raises:
        OSError: If it is gone, or not on this host.
    """
    # The descriptor stays with its process, whoever gets the number next. Elsewhere, or
    # in a virtual machine, the number is another one's: but only in this container is
    # anything mounted from a place named by its id.
    process = os.open(f"/proc/{pid}", os.O_PATH | os.O_CLOEXEC)
    try:
        mountinfo = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
        with os.fdopen(mountinfo, "rb") as file:
            roots = [line.split()[3] for line in file]
        if not any(container_id.encode() in root for root in roots):
            raise ProcessLookupError("its process is not on this host")
        yield process
    finally:
        os.close(process)


def _compare_mounts(
    container_id: str, pid: int, mounts: Sequence[HeldMount]
) -> tuple[HeldMount | None, str]:
    """Return the first mount of another place, and why some were not compared."""
    with ExitStack() as stack:

        def reach(name: str, dir_fd: int | None = None, *, flags: int) -> int:
            fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=dir_fd)
            stack.callback(os.close, fd)
            return fd

        def is_same(held: HeldMount) -> bool:
            place = root
            for part in PurePosixPath(held.mount.container_path).parts[1:]:
                place = reach(part, place, flags=os.O_PATH | os.O_NOFOLLOW)
            status = os.fstat(place)
            return (status.st_dev, status.st_ino) == (held.device, held.inode)

        unread = ""
        try:
            process = stack.enter_context(_held_process(container_id, pid))
            root = reach("root", process, flags=os.O_PATH)
            for held in mounts:
                try:
                    same = is_same(held)
                except PermissionError as exc:
                    unread = str(exc)
                    continue
                except OSError:
                    same = False
                if not same:
                    # Mounts go with the last process: did it live while we looked?
                    reach("root", process, flags=os.O_PATH)
                    return held, unread
        except OSError as exc:
            return None, str(exc)
        return None, unread
