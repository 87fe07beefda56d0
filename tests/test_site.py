"""The site: its check finds what is wrong, and the build passes it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
griffe = pytest.importorskip("griffe", reason="the site is built with mkdocstrings: pip install '.[docs]'")


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(folder: Path, name: str, body: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"<html><body>{body}</body></html>", encoding="utf-8")


def test_a_good_site_has_no_problems(builder: ModuleType, tmp_path: Path) -> None:
    page(tmp_path, "index.html", '<a href="api/p.html#p.f">f</a> <a href="https://arxiv.org">paper</a>')
    page(tmp_path, "api/p.html", '<h2 id="p.f">f</h2><a href="../index.html">start</a><a href="..">start</a>')
    assert builder.problems(tmp_path, {"p": {"p.f"}}) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('<a href="b.html">b</a>', "index.html links to b.html, which does not exist"),
        ('<a href="index.html#b">b</a>', "index.html links to index.html#b, where nothing has this name"),
        ('<a href="#b">b</a>', "index.html links to #b, where nothing has this name"),
        ('<img src="b.png">', "index.html links to b.png, which does not exist"),
        ('<script src="https://unpkg.com/x.js"></script>', "index.html loads https://unpkg.com/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', "index.html loads //fonts.example/a.css"),
    ],
)
def test_what_is_wrong_is_found(builder: ModuleType, tmp_path: Path, body: str, message: str) -> None:
    page(tmp_path, "index.html", body)
    assert builder.problems(tmp_path, {}) == [message]


def test_a_name_without_an_entry_is_found(builder: ModuleType, tmp_path: Path) -> None:
    page(tmp_path, "api/p.html", '<h2 id="p.f">f</h2>')
    assert builder.problems(tmp_path, {"p": {"p.f", "p.g"}}) == ["p.g is not documented in api/p.html"]
    assert builder.problems(tmp_path, {"q": {"q.g"}}) == ["q.g is not documented in api/q.html"]


def test_a_public_name_without_docstring_is_refused(builder: ModuleType) -> None:
    with griffe.temporary_visited_module('def f(): "F."\ndef _g(): pass\nA = 1') as module:
        assert list(builder.names_of(module)) == ["f"]
    with (
        griffe.temporary_visited_module('def f(): "F."\nclass G: pass') as module,
        pytest.raises(builder.SiteError, match=r"module\.G has no docstring"),
    ):
        list(builder.names_of(module))


@pytest.mark.docs
@pytest.mark.timeout(600)
def test_the_site_builds_strictly() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "docs" / "build_site.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "no dead link" in run.stdout
