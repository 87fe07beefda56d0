"""Digests of code change with results only."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_checks import SmallNet
from torch import nn

import ifdefense
from attacks import PGD
from ifdefense.provenance import code_digest, digest, modules_of, versions

Write = Callable[..., str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
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
        forget()
        return code_digest(["made_up.top"])

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
            del sys.modules[name]

    yield write
    forget()


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
    assert {
        "attacks/base.py",
        "attacks/oracle.py",
        "attacks/functional/losses.py",
        "attacks/functional/distances.py",
    } <= files
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


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value


DIFFERENT: list[Callable[[], object]] = [
    lambda: 1,
    lambda: 1.0,
    lambda: True,
    lambda: "1",
    lambda: b"1",
    lambda: b"",
    lambda: "",
    lambda: None,
    lambda: [1],
    lambda: (1,),
    lambda: [1, 2],
    lambda: [[1], 2],
    lambda: [[1, 2]],
    lambda: {1: 2},
    lambda: {1: 2, 3: 4},
    lambda: {3: 4, 1: 2},
    lambda: {1, 2},
    lambda: torch.tensor([1.0, 2.0]),
    lambda: torch.tensor([[1.0, 2.0]]),
    lambda: torch.tensor([1.0, 2.0]).double(),
    lambda: np.array([1.0, 2.0]),
    lambda: np.array(1.0),
    lambda: np.float64(1.0),
    lambda: np.zeros((0, 3)),
    lambda: np.zeros((0, 2)),
    lambda: np.arange(12.0).reshape(3, 4)[:, ::2],
    lambda: np.arange(12.0).reshape(3, 4)[:, 1::2],
    lambda: torch.zeros(0, 3),
    lambda: torch.tensor(True),
    lambda: torch.float32,
    lambda: PGD(),
    lambda: PGD(delta=0.1),
    lambda: Holder(1),
    lambda: Holder(2),
    lambda: Holder(Holder(1)),
    lambda: functools.partial(max, 1),
    lambda: functools.partial(max, 2),
    lambda: functools.partial(min, 2),
    lambda: nn.Linear,
    lambda: torch.relu,
    lambda: Path("a"),
    lambda: nn.Dropout(0.1),
    lambda: nn.Dropout(0.2),
    lambda: SmallNet,
]


def test_digests_tell_values_apart_and_equal_ones_not() -> None:
    digests = [digest(make()) for make in DIFFERENT]
    assert len(set(digests)) == len(digests)
    assert digests == [digest(make()) for make in DIFFERENT]
    assert digest(1, 2) != digest([1, 2]) != digest(12)
    assert digest("ab", "c") != digest("a", "bc")
    loop: list[object] = [1]
    loop.append(loop)
    assert digest(loop) == digest(loop)
    shared = [1]
    assert digest([shared, shared]) != digest([shared, 2])


@pytest.mark.parametrize(
    "value", [lambda: 1, (i for i in range(2)), np.array([object()]), Holder(lambda: 2)], ids=str
)
def test_what_cannot_be_told_apart_has_no_digest(value: object) -> None:
    with pytest.raises(ValueError, match="cannot be identified"):
        digest(value)


def test_the_layout_in_memory_makes_no_difference() -> None:
    values = np.arange(12.0).reshape(3, 4)
    assert (
        digest(values[:, ::2]) == digest(values[:, ::2].copy()) == digest(np.asfortranarray(values[:, ::2]))
    )
    tensor = torch.from_numpy(values)
    assert digest(tensor.T) == digest(tensor.T.contiguous()) != digest(tensor)


@pytest.mark.parametrize("counts", [True, False])
def test_code_counts_for_classes_that_say_so(counts: bool, package: Write) -> None:
    text = """
from ifdefense.provenance import ByCode
from made_up.inner import losses
class Plain:
    def __init__(self):
        self.factor = 2
class Own(Plain, ByCode):
    pass
"""

    def made(loss: str = "def loss(x):\n    return x + 1\n") -> str:
        package(top=text, inner__losses=loss)
        top = importlib.import_module("made_up.top")
        return digest(top.Own() if counts else top.Plain())

    first = made()
    assert made() == first
    assert (made("def loss(x):\n    return x + 2\n") != first) == counts


def test_versions_are_those_of_the_packages() -> None:
    assert versions()["torch"] == torch.__version__
