"""Who may import whom, read from CONTRIBUTING's table and from the source text; lazy and type-only imports count."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCE / "evengaze").rglob("*.py")
}


@lru_cache
def imports(path: Path) -> set[str]:
    """The package's modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return {module for name in found if (module := existing(name)) is not None}


def existing(name: str) -> str | None:
    """The module that an imported name is, or is part of."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def graph() -> dict[str, set[str]]:
    return {module: imports(path) - {module} for module, path in MODULES.items()}


@lru_cache
def rooms() -> list[list[str]]:
    """The rows of CONTRIBUTING's table, each a list of module names."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    table = text[text.index("| room |") :].split("\n\n")[0].splitlines()[2:]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table]
    return [[name if name == "evengaze" else f"evengaze.{name}" for name in row] for row in rows]


def room_of(module: str) -> int:
    """The row whose entry is the longest beginning of a module's name."""
    levels = {name: level for level, row in enumerate(rooms()) for name in row}
    name = module
    while name not in levels or (name == "evengaze" and module != "evengaze"):
        name = name.rpartition(".")[0]
        assert name, f"{module} is in no row of CONTRIBUTING's table of rooms"
    return levels[name]


def test_the_table_names_what_exists() -> None:
    names = [name for row in rooms() for name in row]
    assert len(names) > 15 and len(set(names)) == len(names)
    assert not [name for name in names if name not in MODULES]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_to_rooms_above(module: str) -> None:
    here = room_of(module)
    assert not [other for other in imports(MODULES[module]) - {module} if room_of(other) > here]


def test_no_file_is_part_of_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_and_an_upward_import_would_be_seen() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({**graph(), "evengaze.errors": {"evengaze.trace"}}).prepare()
    assert room_of("evengaze.methods.fastv") > room_of("evengaze.engine.session") > room_of("evengaze.protocol")
    assert len(graph()["evengaze.methods.base"]) > 5 and "evengaze.viz.overlay" in graph()["evengaze.trace"]
