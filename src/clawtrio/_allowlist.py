"""The mount allowlist: what the operator lets groups see besides their own.

It is a file outside every mount, in NanoClaw's format, and read again when it has
changed. Without it no additional mount is granted.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ._codec_allowlist import decode_allowlist, encode_allowlist
from ._errors import AllowlistError, UnsafePathError
from ._forbidden import Forbidden, expand
from ._hostfs import MAX_FILE_BYTES, Directory, check_trusted
from ._models import AllowedRoot, MountAllowlist
from ._settings import Settings
from ._text import one_line

log = logging.getLogger(__name__)

#: Where NanoClaw had it.
NANOCLAW_ALLOWLIST: Final = "~/.config/nanoclaw/mount-allowlist.json"

#: Blocked wherever they are in a component of a path, whatever its case. First
#: NanoClaw's; then what else holds secrets by now. They cannot be switched off, so they
#: are words that few directories without secrets have in their names.
DEFAULT_BLOCKED_PATTERNS: Final = (
    *(".ssh", ".gnupg", ".gpg", ".aws", ".azure", ".gcloud", ".kube", ".docker"),
    *("credentials", ".env", ".netrc", ".npmrc", ".pypirc", "id_rsa", "id_ed25519"),
    *("private_key", ".secret"),
    # keys, keyrings and password stores
    *("id_ecdsa", "id_dsa", ".pem", ".p12", ".pfx", ".putty", ".pki"),
    *("keyring", "keychains", "kwalletd", ".password-store", ".kdbx", ".1password"),
    *(
        "bitwarden",
        ".vault-token",
        ".authinfo",
        ".lastpass",
        ".rbw",
        ".git-credentials",
    ),
    *("xauthority", "iceauthority"),
    # browsers and mail
    *(".mozilla", "org.mozilla", ".thunderbird", "google-chrome", "com.google.chrome"),
    *("bravesoftware", "microsoft-edge", "cookies.sqlite", "librewolf", "waterfox"),
    # clouds and containers
    *(".oci", ".aliyun", ".bluemix", ".doctl", ".hcloud", ".boto", ".s3cfg", ".fly"),
    *(".ibmcloud", ".databricks", ".cargo", ".m2", ".gradle", ".electrum"),
    *(".terraform.d", ".terraformrc", ".pulumi", ".rclone", ".minikube", ".helm"),
    *(".podman", "docker.sock"),
    # registries, databases and agents
    *(".gitcookies", ".yarnrc", ".condarc", ".pgpass", ".my.cnf", ".mylogin.cnf"),
    *(".claude", ".codex", ".gemini"),
    # what somebody typed
    *("_history", ".histfile", ".lesshst", ".viminfo", "zsh_sessions", "atuin"),
)

#: What ``clawtrio mounts init`` writes.
TEMPLATE: Final = MountAllowlist(
    allowed_roots=(
        AllowedRoot(
            "~/projects",
            allow_read_write=False,
            description=(
                "Any directory in here may be mounted for a group that asks for it, "
                "read-only. A root that does not exist allows nothing"
            ),
        ),
        AllowedRoot(
            "~/agents",
            allow_read_write=True,
            description=(
                "Groups that ask for it may also write in here: main, and the others "
                "once nonMainReadOnly is false. An agent may put anything here: keep "
                "no program here that you run, and no other root below it"
            ),
        ),
    ),
    # As in NanoClaw's own; the default ones hold as well.
    blocked_patterns=("password", "secret", "token"),
    non_main_read_only=True,
)


def write_template(path: str, *, force: bool) -> None:
    """Write an allowlist to begin with.

    Args:
        path: Where; its directory is made if need be, for us alone.
        force: Whether to replace one that is there.

    Raises:
        FileExistsError: If there is one, and *force* is False.
        OSError: If it cannot be written.
    """
    place = Path(path)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Directory.at(str(place.parent)) as directory:
        data = encode_allowlist(TEMPLATE)
        directory.write(place.name, data, mode=0o600, replace=force)


def is_blocked(name: str, patterns: Iterable[str] = ()) -> str | None:
    """Return the pattern, a default one or one of these, that a name has in it."""
    folded = name.casefold()
    wanted = (*DEFAULT_BLOCKED_PATTERNS, *patterns)
    return next((p for p in wanted if p.casefold() in folded), None)


class AllowlistFile:
    """The allowlist as it is at the moment: it is read again when it has changed.

    Args:
        settings: Where it is. At the default place, NanoClaw's is as good if ours is
            not there.
        forbidden: Knows where agents can write.
    """

    def __init__(self, settings: Settings, forbidden: Forbidden) -> None:
        self._forbidden = forbidden
        self._places = [settings.allowlist_path]
        if settings.allowlist_path == Settings().allowlist_path:
            self._places.append(expand(NANOCLAW_ALLOWLIST))
        self._version: tuple[object, ...] | None = None
        self._found: MountAllowlist | str = ""
        self._missed = False
        self._told: set[str] = set()

    @property
    def path(self) -> str:
        """Where it is, or should be."""
        return next(filter(os.path.lexists, self._places), self._places[0])

    def read(self) -> MountAllowlist | None:
        """Return what it says; None if there is none, with a warning the first time.

        Raises:
            AllowlistError: If it is malformed, or others than us could write it.
        """
        path = self.path
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            self._warn_that_it_is_missing(path)
            return None
        except OSError as exc:
            raise AllowlistError(path, f"cannot be read: {exc.strerror}") from exc
        self._missed = False
        self._check_writers(path)
        version = (
            *(path, status.st_dev, status.st_ino, status.st_size),
            *(status.st_mtime_ns, status.st_ctime_ns),
        )
        if self._version != version:
            self._told.clear()
            self._found = _load(path, status.st_mode)
            self._version = version
        if isinstance(self._found, str):
            raise AllowlistError(path, self._found)
        return self._found

    def first_time(self, complaint: str) -> bool:
        """Whether this complaint about what it says is a new one."""
        new = complaint not in self._told
        self._told.add(complaint)
        return new

    def _warn_that_it_is_missing(self, path: str) -> None:
        if not self._missed:
            self._missed = True
            log.warning(
                "there is no mount allowlist %s: no additional mounts", one_line(path)
            )

    def _check_writers(self, path: str) -> None:
        uids, gids = frozenset({0, os.geteuid()}), frozenset({0, os.getegid()})
        try:
            check_trusted(path, uids, gids)
        except UnsafePathError as exc:
            raise AllowlistError(path, f"cannot be trusted: {exc}") from exc
        if self._forbidden.agent_may_replace(path):
            raise AllowlistError(path, "is where agents can write: keep it elsewhere")


def _load(path: str, mode: int) -> MountAllowlist | str:
    """Read the file, or say what is wrong with it."""
    if not stat.S_ISREG(mode):
        return "must be a regular file"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        return f"cannot be read: {exc.strerror}"
    if len(data) > MAX_FILE_BYTES:
        return f"must not be larger than {MAX_FILE_BYTES} bytes"
    try:
        return decode_allowlist(data)
    except ValueError as exc:
        return str(exc)
