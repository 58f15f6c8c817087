"""What is public, and how modules stack."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import attrs
import pytest

import clawtrio
import clawtrio.testing
from clawtrio import ClawtrioError

PACKAGE = Path(clawtrio.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
# What "General layout" lists, from the top down.
LAYOUT = [
    name
    for line in re.findall(
        r"^#   (\S+(?:, \S+)*)  +\S",
        (PACKAGE / "__init__.py").read_text(),
        re.MULTILINE,
    )
    for name in line.split(", ")
]


def _public(module: ModuleType) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


def _room(module: str) -> str | None:
    """Find the entry that a module stands under: _bwrap_argv is a part of _bwrap."""
    if module == "__main__":
        return "_cli"
    rooms = [r for r in LAYOUT if module == r or module.startswith(f"{r}_")]
    return max(rooms, key=len, default=None)


def _imports(path: Path) -> set[str]:
    """Name the modules of ours that one imports, wherever in its text it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            module = (node.module or "").split(".")[0]
            found |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = node.module.split(".")
            if parts[0] == "clawtrio":
                found |= set(parts[1:2]) or {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "clawtrio":
                    found |= set(alias.name.split(".")[1:2]) or {"__init__"}
    return found


def test_the_layout_lists_every_module_once() -> None:
    """Whoever opens the package finds each module in its first comment."""
    assert Counter(LAYOUT).most_common(1)[0][1] == 1
    assert [module for module in MODULES if _room(module) is None] == []
    assert [room for room in LAYOUT if room not in MODULES] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_above(module: str) -> None:
    """No module knows one that is further down the way of the data."""
    room = _room(module)
    assert room is not None
    allowed = LAYOUT[: LAYOUT.index(room) + 1]

    imported = _imports(PACKAGE / f"{module}.py")

    assert {name for name in imported if _room(name) not in allowed} == set()


def test_names_are_re_exported_so_that_type_checkers_see_it() -> None:
    """Each public name comes as "from ._x import y as y", from a private module."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]

    assert all(n.level == 1 and (n.module or "").startswith("_") for n in imports)
    names = [(alias.name, alias.asname) for node in imports for alias in node.names]
    assert [name for name, public in names if name != public] == []
    assert {name for name, _ in names} == set(_public(clawtrio))


@pytest.mark.parametrize("name", sorted(_public(clawtrio)))
def test_a_public_name_carries_the_public_place(name: str) -> None:
    """Tracebacks and documentation say clawtrio.X."""
    value = getattr(clawtrio, name)

    assert value.__module__ == "clawtrio"
    assert value.__name__ == name
    assert value.__doc__


def test_nothing_is_public_twice() -> None:
    """One thing has one name, in one place."""
    places = [_public(clawtrio), _public(clawtrio.testing)]
    here = list(places[0].values()) + [
        value
        for value in places[1].values()
        if getattr(value, "__module__", "") == "clawtrio.testing"
    ]

    assert [n for n in Counter(map(id, here)).values() if n > 1] == []


def test_every_error_is_public() -> None:
    """Whatever clawtrio raises on purpose can be caught by a public name."""
    for module in pkgutil.iter_modules([str(PACKAGE)]):
        if module.name != "__main__":
            importlib.import_module(f"clawtrio.{module.name}")
    # The command line has errors of its own, which never leave it.
    errors = [e for e in ClawtrioError.__subclasses__() if "_cli" not in e.__module__]

    assert errors
    assert [e for e in errors if getattr(clawtrio, e.__name__, None) is not e] == []


def test_what_public_values_hold_is_public() -> None:
    """Nobody meets a type of ours that cannot be named, in a field of a public one."""
    values = [
        value
        for value in _public(clawtrio).values()
        if isinstance(value, type) and attrs.has(value)
    ]
    ours = {
        name
        for value in values
        for field in attrs.fields(value)
        for name in re.findall(r"[A-Z]\w+", str(field.type))
        if _is_ours(name)
    }

    assert ours
    assert ours - set(_public(clawtrio)) == set()


def _is_ours(name: str) -> bool:
    modules = [
        importlib.import_module(f"clawtrio.{m}") for m in ("_models", "_runtimes")
    ]
    found = [getattr(module, name, None) for module in modules]
    return any(getattr(v, "__module__", "").startswith("clawtrio") for v in found)


@pytest.mark.parametrize(
    "name",
    [
        "AdditionalMount",
        "AgentOutput",
        "AllowedRoot",
        "AllowlistError",
        "ClawtrioError",
        "ContainerConfig",
        "CredentialsError",
        "DroppedFrame",
        "Ending",
        "FollowUpRefusedError",
        "Group",
        "GroupBusyError",
        "GroupFolderError",
        "MarkerParser",
        "MountAllowlist",
        "NotStartedError",
        "RunClosedError",
        "RunResult",
        "Runtime",
        "RuntimeUnavailableError",
        "Settings",
        "SettingsError",
        "UnsafePathError",
        "VolumeMount",
        "open_engine",
    ],
)
def test_the_contract_s_names_are_there(name: str) -> None:
    """Bots are written against these."""
    assert hasattr(clawtrio, name)


def test_the_fakes_are_public() -> None:
    """Tests of bots find a runtime, an agent and frames in clawtrio.testing."""
    for name in ("FakeRuntime", "framed", "scripted_agent"):
        assert getattr(clawtrio.testing, name).__module__ == "clawtrio.testing"


def test_type_checkers_are_told_that_there_are_types() -> None:
    """The package ships py.typed."""
    assert files("clawtrio").joinpath("py.typed").is_file()


@pytest.mark.parametrize(
    "cls",
    [
        value
        for value in _public(clawtrio).values()
        if isinstance(value, type) and attrs.has(value)
    ],
)
def test_types_of_fields_can_be_told(cls: type[attrs.AttrsInstance]) -> None:
    """So cattrs and others can store our values for an application."""
    hints = get_type_hints(cls)

    for field in attrs.fields(cls):
        assert field.type == hints[field.name]
        assert not isinstance(field.type, str)
