"""A group's wishes for more directories -> mounts that are held, and refusals.

What is checked is what is held: a wish is opened first, following symlinks, then asked
for its real path by its descriptor, and that is compared with the rules. Whatever
happens to the names in between, the directory that was judged is the one that is given.

Only directories can be mounted: a file would be mounted by its inode, and the container
keep an old one once an editor has replaced it.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import attrs

from ._allowlist import AllowlistFile, is_blocked
from ._errors import AllowlistError
from ._forbidden import Forbidden, expand, trail
from ._grants_sources import (
    RefusedError,
    find_socket,
    open_directory,
    place_of,
    source_of,
    target_of,
)
from ._models import AdditionalMount, AllowedRoot, MountAllowlist, VolumeMount
from ._runtimes import HeldMount
from ._text import one_line

log = logging.getLogger(__name__)

#: Roots, each with where it really is.
_Roots: TypeAlias = "list[tuple[Path, AllowedRoot]]"
#: What is held; and the refused wishes, each with the reason in one line.
Grants: TypeAlias = "tuple[list[HeldMount], list[tuple[AdditionalMount, str]]]"
Logger: TypeAlias = "logging.Logger | logging.LoggerAdapter[logging.Logger]"


@attrs.frozen
class Decision:
    """What became of one wish, and why.

    Attributes:
        request: The wish.
        reason: Why it is refused, and what would help; or which root allows it, and why
            not for writing. One line.
        held: What was granted; None if it was refused.
    """

    request: AdditionalMount
    reason: str
    held: HeldMount | None = None


class WritableSources:
    """The additional mounts that live runs can write in, by their real paths."""

    def __init__(self) -> None:
        self._places: list[Path] = []

    def add(self, place: Path, stack: ExitStack) -> None:
        """Remember a directory until *stack* closes. Two runs may have the same."""
        self._places.append(place)
        stack.callback(self._places.remove, place)

    def above(self, place: Path) -> Path | None:
        """Return one that *place* is strictly below, if there is one."""
        return next((p for p in self._places if p in place.parents), None)


def grant_mounts(
    requests: Sequence[AdditionalMount],
    *,
    is_main: bool,
    allowlist: AllowlistFile,
    forbidden: Forbidden,
    writable: WritableSources,
    compares: bool,
    stack: ExitStack,
    logger: Logger = log,
) -> Grants:
    """Hold what is granted of a group's wishes, and say why the others are not.

    Args:
        requests: The wishes. Where the targets of two overlap, the first is granted.
        is_main: Whether the group is the main one.
        allowlist: What the operator allows.
        forbidden: What nobody is given.
        writable: What live runs can write in. What this one can is added.
        compares: Whether the runtime can tell afterwards what was mounted.
        stack: Gives back, at the run's end, what is held.
        logger: Told of roots that allow nothing, and of sockets that the container
            will see; not of refusals.

    Returns:
        What is held; and the refused wishes, each with the reason in one line.
    """
    judge = _Judge(
        is_main=is_main,
        allowlist=allowlist,
        forbidden=forbidden,
        writable=writable,
        compares=compares,
        logger=logger,
    )
    decisions = judge.decide(requests, stack)
    held = [decision.held for decision in decisions if decision.held is not None]
    for mount in held:
        source = Path(mount.mount.host_path)
        if (name := find_socket(mount.fd)) is not None:
            socket = one_line(str(source / name))
            logger.warning("the container will be able to connect to %s", socket)
        if not mount.mount.readonly:
            writable.add(source, stack)
    return held, [(d.request, d.reason) for d in decisions if d.held is None]


def explain(
    request: AdditionalMount,
    *,
    is_main: bool,
    allowlist: AllowlistFile,
    forbidden: Forbidden,
) -> Decision:
    """Tell what would become of a wish; what it was granted is held no more."""
    judge = _Judge(
        is_main=is_main,
        allowlist=allowlist,
        forbidden=forbidden,
        writable=WritableSources(),
        compares=True,
        logger=log,
    )
    with ExitStack() as stack:
        return judge.decide([request], stack)[0]


def _writable_roots(allowlist: MountAllowlist) -> Iterator[Path]:
    for root in allowlist.allowed_roots:
        if root.allow_read_write and (place := _directory(root)) is not None:
            yield place


def _directory(root: AllowedRoot) -> Path | None:
    """Return where a root really is; None if no directory is there."""
    try:
        # Strict: else "missing/.." would be a directory, which it is to nobody else.
        place = os.path.realpath(expand(root.path), strict=True)
        return Path(place) if stat.S_ISDIR(Path(place).stat().st_mode) else None
    except OSError:
        return None


@attrs.frozen(kw_only=True)
class _Judge:
    """Judges the wishes of one group. See :func:`grant_mounts`."""

    is_main: bool
    allowlist: AllowlistFile
    forbidden: Forbidden
    writable: WritableSources
    compares: bool
    logger: Logger

    def decide(
        self, requests: Iterable[AdditionalMount], stack: ExitStack
    ) -> list[Decision]:
        """Decide on each wish, and hold what is granted."""
        decisions: list[Decision] = []
        taken: list[PurePosixPath] = []
        for request in requests:
            try:
                # A stack of its own: what is refused after all is not held.
                with ExitStack() as attempt:
                    decision = self._grant(request, taken, attempt)
                    stack.push(attempt.pop_all())
            except RefusedError as exc:
                reason = one_line(f"{request.host_path}: {exc}")
                decision = Decision(request, reason)
            decisions.append(decision)
        return decisions

    def _grant(
        self, request: AdditionalMount, taken: list[PurePosixPath], stack: ExitStack
    ) -> Decision:
        target = target_of(request)
        rules = self._rules()
        path = source_of(request)
        fd = open_directory(path, stack)
        place = place_of(fd)
        self._check_names(path, place, rules)
        self._check_place(path, place)
        root = self._root_of(place, rules)
        readonly, reason = self._mode(request, place, root, rules)
        for other in taken:
            if target.is_relative_to(other) or other.is_relative_to(target):
                problem = f"{target} overlaps {other}: choose another container path"
                raise RefusedError(problem)
        status = os.fstat(fd)
        mount = VolumeMount(str(place), str(target), readonly)
        held = HeldMount(
            mount,
            fd,
            status.st_dev,
            status.st_ino,
            # A runtime that mounts by path may come upon something else by then.
            replaceable=self.forbidden.agent_may_replace(
                str(place), _writable_roots(rules)
            ),
        )
        if held.replaceable and not self.compares:
            problem = (
                f"{place} is below a root with allowReadWrite, and this runtime cannot "
                "tell what it mounts: choose another place, or an engine on this host"
            )
            raise RefusedError(problem)
        taken.append(target)
        return Decision(request, one_line(reason), held)

    def _rules(self) -> MountAllowlist:
        try:
            rules = self.allowlist.read()
        except AllowlistError as exc:
            raise RefusedError(f"allowlist {exc}") from exc
        if rules is None:
            problem = (
                f"there is no allowlist {self.allowlist.path}: 'clawtrio mounts init' "
                "writes one"
            )
            raise RefusedError(problem)
        return rules

    def _check_names(self, path: str, place: Path, rules: MountAllowlist) -> None:
        """Refuse what has a blocked pattern in a name, a symlink's included."""
        names = {name for entry in (*trail(path), place) for name in entry.parts}
        for name in sorted(names):
            pattern = is_blocked(name, rules.blocked_patterns)
            if pattern is not None:
                problem = f"the name {name!r} has the blocked pattern {pattern!r} in it"
                raise RefusedError(problem)

    def _check_place(self, path: str, place: Path) -> None:
        if (complaint := self.forbidden.complaint(place)) is not None:
            raise RefusedError(f"{complaint}, so it is never mounted")
        for entry in (*trail(path), place):
            if (above := self.writable.above(entry)) is not None:
                problem = (
                    f"{entry} is in {above}, where a live run can write: mount that, "
                    "or wait until it is over"
                )
                raise RefusedError(problem)

    def _root_of(self, place: Path, rules: MountAllowlist) -> AllowedRoot:
        """Return the root nearest to *place*; of the same one twice, the stricter."""
        sound, doubtful = self._roots(rules)
        around = [pair for pair in sound if place.is_relative_to(pair[0])]
        if not around:
            roots = ", ".join(root.path for root in rules.allowed_roots) or "none"
            problem = (
                f"{place} is not in an allowed root ({roots}): add one to allowedRoots "
                f"in {self.allowlist.path}"
            )
            raise RefusedError(problem)
        # These allow nothing, but a read-only one has set something apart.
        around += [
            (top, root)
            for top, root in doubtful
            if place.is_relative_to(top) and not root.allow_read_write
        ]
        _, nearest = max(
            around, key=lambda pair: (len(pair[0].parts), not pair[1].allow_read_write)
        )
        return nearest

    def _roots(self, rules: MountAllowlist) -> tuple[_Roots, _Roots]:
        """Resolve the roots: those that count, and those that agents could redirect."""
        writable = [*_writable_roots(rules)]
        sound: _Roots = []
        doubtful: _Roots = []
        for root in rules.allowed_roots:
            place = _directory(root)
            if place is None:
                self._warn(root, "is not an existing directory")
            elif self.forbidden.agent_may_replace(expand(root.path), writable):
                self._warn(root, "is where agents may write")
                doubtful.append((place, root))
            else:
                sound.append((place, root))
        return sound, doubtful

    def _warn(self, root: AllowedRoot, problem: str) -> None:
        complaint = one_line(f"allowed root {root.path} {problem}: it allows nothing")
        if self.allowlist.first_time(complaint):
            self.logger.warning("%s", complaint)

    def _mode(
        self,
        request: AdditionalMount,
        place: Path,
        root: AllowedRoot,
        rules: MountAllowlist,
    ) -> tuple[bool, str]:
        """Tell whether the mount is read-only, and why it may be mounted at all."""
        reason = f"allowed by root {root.path}"
        # As in NanoClaw, who asks for too much gets less, not nothing, and only a plain
        # False asks for it.
        if request.readonly is not False:
            return True, reason
        if not self.is_main and rules.non_main_read_only:
            return True, f"{reason}; only main may write, by nonMainReadOnly"
        if not root.allow_read_write:
            return True, f"{reason}, which has not got allowReadWrite"
        if (complaint := self.forbidden.write_complaint(place)) is not None:
            return True, f"{reason}; {complaint}, so nobody may write"
        return False, reason
