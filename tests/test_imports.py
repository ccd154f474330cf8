"""The rooms of the package: imports run from later rooms to earlier ones, and no module needs itself."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"fastnull": ROOT / "fastnull", "fastnull.kernels": ROOT / "kernels"}

ROWS = (
    ("__init__", "_C", "checks", "choices", "compat", "folder_lock", "lazy", "paths", "progress", "record", "rng")
    + ("tensor_files",),
    ("vit",),
    ("distributed",),
    ("data",),
    ("ops", "kernels"),
    ("build_info", "models", "noise", "testing"),
    ("selftest",),
    ("encoder",),
    ("nullspace",),
    ("synthesis",),
    ("augment",),
    ("robustness",),
    ("finetune",),
    ("integrations",),
    ("report",),
    ("analysis", "bench", "experiments"),
    ("cli",),
    ("__main__",),
)
"""Rooms, and the modules that stand alone. What a row holds may import from its own row and the rows above."""
ROW = {room: index for index, row in enumerate(ROWS) for room in row}

LATE = {("fastnull.ops.common", "fastnull.kernels"), ("fastnull.ops.common", "fastnull.ops.dispatch")}
"""Imports that close a circle on purpose: what chooses among kernels is registered at the first CUDA tensor."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules that a module imports, wherever in it: also in functions and for type checkers.

    A face (the __init__.py of a room) names its public names for type checkers alone, which is no import. That a
    module's own packages are imported before it does not count either: faces import nothing themselves.
    """
    path = MODULES[name]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    if path.name == "__init__.py":
        typed = [node for node in nodes if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
        nodes = [node for node in nodes if not any(node in ast.walk(block) for block in typed)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module or "")
    return {other for other in found if other in MODULES}


GRAPH = {name: imports(name) for name in MODULES}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_module_has_its_place() -> None:
    assert {room(name) for name in MODULES} <= set(ROW), "give it a row in ROWS"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_runs_upwards(name: str) -> None:
    upwards = {other for other in GRAPH[name] if ROW[room(other)] > ROW[room(name)]}
    assert not {other for other in upwards if (name, other) not in LATE}


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(GRAPH[name]):
                if (name, other) not in LATE:
                    follow(other, (*way, name))
            done.add(name)

    for name in sorted(GRAPH):
        follow(name, ())


FACES = sorted(name for name, path in MODULES.items() if path.name == "__init__.py" and name != "fastnull.kernels")


@pytest.mark.parametrize("name", FACES)
def test_faces_have_what_they_name(name: str) -> None:
    """Every public name loads, type checkers see the same names, and no module of the room hides behind one."""
    face = importlib.import_module(name)
    public = getattr(face, "__all__", [])
    for each in public:
        assert hasattr(face, each), each
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for block in (node for node in tree.body if isinstance(node, ast.If)):
        typed = [node for node in block.body if isinstance(node, ast.ImportFrom)]
        assert {alias.name for node in typed for alias in node.names} == set(public) - {"__version__"}
        for node in typed:
            home = importlib.import_module(node.module or "")
            assert all(getattr(face, alias.name) is getattr(home, alias.name) for alias in node.names)
        assert not [each for each in public if f"{name}.{each}" in MODULES]


def test_the_page_on_the_architecture_names_what_is_there() -> None:
    """Its table has the rooms in the order of ROWS, and every file that it or CONTRIBUTING.md names exists."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    firsts = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    table = [set(re.findall(r"`(\w+)(?:/|\.py)`", first)) for first in firsts]
    inner = {"__init__", "__main__"}  # no room of their own
    assert table == [set(row) - inner for row in ROWS if set(row) - inner]
    named = page + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w.-]+/[\w./-]*)`", named):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "fastnull")), name
