"""Imports run one way, and importing the library loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "ifdefense": {"ifdefense"},
    "attacks": {"attacks", "ifdefense"},
    "classifiers": {"classifiers", "ifdefense"},
    "benchmarks": {"benchmarks", "attacks", "classifiers", "ifdefense"},
}
HEAVY = {"h5py", "matplotlib", "point_cloud_utils", "scipy", "skimage", "torch_geometric", "trimesh"}


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


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.parametrize("module", ["ifdefense", "ifdefense.cli", "attacks", "classifiers", "benchmarks.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    # What torch itself brings along is not ours to answer for.
    loaded = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    assert HEAVY.isdisjoint(loaded.split())


def test_import_costs_little_on_top_of_torch() -> None:
    code = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import ifdefense\n"
        "ifdefense.purify\n"
        "print(time.perf_counter() - start)\n"
    )
    # The fastest of three: a busy machine only ever makes it slower.
    assert min(float(python(code)) for _ in range(3)) <= 0.3
