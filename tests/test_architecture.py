"""Import rules between packages, and the cost of importing the library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

import classifiers

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "ifdefense": {"ifdefense"},
    "attacks": {"attacks", "ifdefense"},
    "classifiers": {"classifiers", "ifdefense"},
    "benchmarks": {"benchmarks", "attacks", "classifiers", "ifdefense"},
}
HEAVY = {
    "fast_simplification",
    "h5py",
    "matplotlib",
    "point_cloud_utils",
    "pyarrow",
    "ray",
    "scipy",
    "skimage",
    "torch_geometric",
    "trimesh",
}


def imported_packages(source: str, package: str) -> set[str]:
    """The top-level packages that a module imports anywhere, also inside its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level or node.module is None else node.module.split(".")[0])
    return found


def test_imported_packages_sees_every_form() -> None:
    source = "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h as i\n"
    assert imported_packages(source, "p") == {"a", "c", "p", "h"}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_run_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(file.relative_to(ROOT)): sorted(bad)
        for file in files
        if (bad := imported_packages(file.read_text(), package) & (ALLOWED.keys() - ALLOWED[package]))
    }
    assert not wrong


def test_networks_of_classifiers_import_nothing_from_each_other() -> None:
    known = modules("classifiers")
    networks = {module for module, _, _ in classifiers.NETWORKS.values()}
    found = {
        name: sorted(networks & imported_modules(file.read_text(), known) - {name})
        for name, file in known.items()
    }
    # Training knows PointNet's penalty.
    assert {name for name, imports in found.items() if imports} <= {"classifiers.run"}


ROOMS: dict[str, set[str]] = {
    "devices": set(),
    "guard": set(),
    "geometry": {"devices"},
    "timing": {"devices"},
    "threads": set(),
    "arguments": {"devices"},
    "console": {"arguments"},
    "checkpoints": {"geometry"},
    "logits": {"guard"},
    "provenance": set(),
    "attributes": {"geometry"},
    "structures": {"arguments", "geometry"},
    "clouds": {"arguments", "attributes", "devices", "structures"},
    "corruptions": {"devices", "geometry"},
    "data": {"attributes", "geometry"},
    "shapes": {"data", "geometry"},
    "implicit": {"checkpoints", "devices", "geometry", "guard", "provenance", "threads"},
    "point_networks": {"checkpoints", "geometry", "guard"},
    "stages": {"devices", "geometry", "implicit"},
    "restorers": {"devices", "geometry", "implicit", "stages", "timing"},
    "purifiers": {
        "checkpoints",
        "arguments",
        "clouds",
        "devices",
        "geometry",
        "guard",
        "implicit",
        "logits",
        "point_networks",
        "provenance",
        "restorers",
        "stages",
        "structures",
        "threads",
        "timing",
    },
    "transforms": {"arguments", "geometry", "provenance", "purifiers"},
    "report": {"geometry", "purifiers"},
    "training": {
        "checkpoints",
        "console",
        "corruptions",
        "data",
        "devices",
        "geometry",
        "implicit",
        "point_networks",
        "provenance",
        "restorers",
        "shapes",
        "stages",
    },
    "reconstruction": {
        "console",
        "geometry",
        "implicit",
        "provenance",
        "shapes",
        "stages",
        "training",
    },
    "pool": set(),
    "batch": {"batch_plan", "clouds", "data", "pool", "purifiers", "report"},
    "batch_plan": {"clouds", "data"},
    "distributed": {"arguments", "clouds", "geometry", "pool", "purifiers", "threads"},
    "cli": {
        "batch",
        "batch_plan",
        "console",
        "data",
        "distributed",
        "geometry",
        "ifdefense",
        "pool",
        "purifiers",
    },
    "__main__": {"cli"},
    "ifdefense": {"geometry", "purifiers"},
}
"""Which rooms of ``ifdefense`` a room may import, also inside of functions."""


def modules(package: str) -> dict[str, Path]:
    """Files of a package by dotted name."""
    files = (ROOT / package).rglob("*.py")
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported_modules(source: str, known: Collection[str]) -> set[str]:
    """Known modules that a source imports, also inside of functions, but not for types only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.module and not child.level, f"relative import in line {child.lineno}"
                inner = (f"{child.module}.{alias.name}" for alias in child.names)
                found.update(name if name in known else child.module for name in inner)
            visit(child)

    visit(ast.parse(source))
    return found & set(known)


def test_imported_modules_sees_functions_but_not_types() -> None:
    source = (
        "from p import a, name\n"
        "if TYPE_CHECKING:\n    import p.b\n"
        "class C:\n    def f(self):\n        from p.c import g\n        import p.d, q\n"
    )
    assert imported_modules(source, {"p", "p.a", "p.b", "p.c", "p.d"}) == {"p", "p.a", "p.c", "p.d"}
    with pytest.raises(AssertionError, match="relative import in line 1"):
        imported_modules("from . import a", {"p.a"})


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of some circle of a graph, in order; empty if there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if found := search(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def test_circle_finds_circles_only() -> None:
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_no_circles(package: str) -> None:
    """Nor one by an import that is deferred into a function."""
    known = modules(package)
    graph = {name: imported_modules(file.read_text(), known) - {name} for name, file in known.items()}
    assert circle(graph) == []


def test_rooms_import_only_what_they_may() -> None:
    known = modules("ifdefense")

    def room(name: str) -> str:
        return name.split(".")[1] if "." in name else name

    wrong = {
        (name, other)
        for name, file in known.items()
        for other in imported_modules(file.read_text(), known)
        if room(other) != room(name) and room(other) not in ROOMS.get(room(name), set())
    }
    assert not wrong
    assert {room(name) for name in known} == set(ROOMS), "a room without a line in ROOMS, or a line too many"
    # What is allowed is without circles itself, but for the package's own lazy names.
    assert circle({name: allowed - {"ifdefense"} for name, allowed in ROOMS.items()}) == []


def test_shelves_of_training_import_downwards() -> None:
    """Recipes use examples, examples use data; and no file imports from one that defines a command."""
    shelves = ["data", "examples", "recipes"]
    known = modules("ifdefense")
    commands = {name for name, file in known.items() if "@click.command(" in file.read_text()}
    assert "ifdefense.training.recipes.local" in commands
    for name, file in known.items():
        imported = imported_modules(file.read_text(), known) - {name}
        assert not imported & commands - {"ifdefense.batch", "ifdefense.cli"}, name
        if not name.startswith("ifdefense.training."):
            continue
        shelf = name.split(".")[2]
        above = shelves[shelves.index(shelf) + 1 :] if shelf in shelves else shelves
        assert not [
            other for other in imported if other.split(".")[1:3] in [["training", s] for s in above]
        ], name


def test_the_defence_never_imports_reconstruction() -> None:
    """Its networks and commands are found by name alone, in two registries."""
    assert not [room for room, allowed in ROOMS.items() if "reconstruction" in allowed]
    inside = ROOT / "ifdefense" / "reconstruction"
    named = {
        name
        for name, file in modules("ifdefense").items()
        if inside not in file.parents and "ifdefense.reconstruction" in file.read_text()
    }
    assert named == {"ifdefense.cli", "ifdefense.implicit.base"}


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_import_loads_nothing_heavy() -> None:
    """One interpreter imports all in turn: the first module after which something heavy is there is named."""
    # What torch itself brings along is not ours to answer for.
    loaded = python(
        "import importlib, sys, torch\n"
        "before = set(sys.modules)\n"
        "for name in ('ifdefense', 'ifdefense.cli', 'attacks', 'classifiers', 'benchmarks.cli'):\n"
        "    importlib.import_module(name)\n"
        "    print(name, *{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    heavy = {module: HEAVY & set(names) for module, *names in map(str.split, loaded.splitlines())}
    assert len(heavy) == 5 and not any(heavy.values()), heavy


def test_import_costs_little_on_top_of_torch() -> None:
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import ifdefense\n"
        "ifdefense.purify\n"
        "print(time.process_time() - start)\n"
    )
    # A busy machine only ever makes it slower: the second and the third try are for that.
    assert any(float(python(code)) <= 0.3 for _ in range(3))
