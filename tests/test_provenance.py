"""Digests of code change with results only."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ifdefense
from ifdefense.provenance import code_digest, digest, modules_of, versions

Write = Callable[..., str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a package ``made_up`` and returns the digest of its module ``top``."""
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "made_up"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "__init__.py").write_text("")
    files = {
        "__init__": "from made_up.other import unused\n",
        "top": "from made_up.inner import losses\nVALUE = losses.loss(1)\n",
        "inner/losses": '"""Losses."""\ndef loss(x):\n    """One."""\n    return x + 1\n',
        "other": "unused = 1\n",
    }

    def write(**changes: str) -> str:
        for name, text in (files | {name.replace("__", "/"): text for name, text in changes.items()}).items():
            (folder / f"{name}.py").write_text(text)
        sys.modules.pop("made_up", None)
        return code_digest(["made_up.top"])

    return write


def test_comments_docstrings_and_layout_make_no_difference(package: Write) -> None:
    assert package() == package(inner__losses="# a comment\ndef loss(x):\n\n    return (x+1)\n")
    assert package() == package(top='from made_up.inner import losses\nVALUE = losses.loss(1)\n"""Why."""\n')


def test_code_of_an_imported_module_makes_a_difference(package: Write) -> None:
    assert package() != package(inner__losses="def loss(x):\n    return x + 2\n")
    assert package(top="from .inner import losses\n") != package(
        top="from .inner import losses\n", inner__losses="def loss(x):\n    return x + 2\n"
    )
    lazy = "def f():\n    import made_up.other\n"
    assert package(top=lazy) != package(top=lazy, other="unused = 2\n")


def test_code_that_is_not_imported_makes_none(package: Write) -> None:
    assert package() == package(other="unused = 2\n")
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made_up import other\n"
    assert package(top=typing) == package(top=typing, other="unused = 2\n")


def reached(root: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Files that the digest of a module reads, relative to the repository."""
    seen: set[Path] = set()
    module = sys.modules["ifdefense.provenance"]
    parsed = module._parsed

    def spy(path: Path, changed: int) -> object:
        seen.add(path)
        return parsed(path, changed)

    monkeypatch.setattr(module, "_parsed", spy)
    code_digest([root])
    return {path.relative_to(Path(__file__).parent.parent).as_posix() for path in seen}


def test_attacks_depend_on_their_mathematics_and_not_on_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    files = reached("attacks.gradient.pgd", monkeypatch)
    assert {"attacks/base.py", "attacks/functional/losses.py", "attacks/functional/distances.py"} <= files
    assert not {"ifdefense/cli.py", "attacks/__init__.py", "ifdefense/purifiers/registry.py"} & files


def test_purifiers_depend_on_their_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = modules_of(ifdefense.load("onet-mesh").spec())
    assert {
        "ifdefense.purifiers.compose",
        "ifdefense.restorers.mesh",
        "ifdefense.stages.extraction",
    } <= modules
    files = reached("ifdefense.purifiers.compose", monkeypatch)
    assert "ifdefense/geometry/frame.py" in files
    assert not {"ifdefense/cli.py", "ifdefense/purifiers/registry.py"} & files


def test_modules_without_source_are_left_out() -> None:
    assert code_digest(["builtins", "no_such_module", "ifdefense.no_such"]) == code_digest([])


def test_digests_of_data() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"a": 1, "b": [2]}) != digest({"a": 1, "b": [3]})
    assert re.fullmatch("[0-9a-f]{16}", digest(None))
    points = torch.zeros(2, 3)
    assert digest(points) == digest(points.clone()) != digest(points.reshape(3, 2))
    assert digest(points) != digest(points + 1)


def test_versions_are_those_of_the_packages() -> None:
    assert versions()["torch"] == torch.__version__
