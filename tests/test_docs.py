"""The documentation: tables are up to date and examples run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sample_box
from torch import Tensor, nn

import attacks
from attacks.base import Attack, Oracle, ThreatModel
from benchmarks import catalogue, record, tables
from classifiers import fold

ROOT = Path(__file__).parent.parent


def example(document: str) -> str:
    """The last Python block of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    block: str = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    return block


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_tables_are_up_to_date(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert tables.fill(text, ROOT / record.FOLDER) == text, "run python -m benchmarks.tables"


def test_the_lines_of_the_readme_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    points = torch.rand(3, 300, 3, generator=torch.Generator().manual_seed(0))
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(900, 5))
    space: dict[str, Any] = {"points": points, "classifier": classifier}
    exec("\n".join(blocks), space)
    assert space["clean"].shape == points.shape
    assert space["model"](points).shape == (3, 5)


def test_every_attack_names_its_source() -> None:
    assert len(catalogue.methods()) >= 20
    for name, value in catalogue.methods().items():
        assert catalogue.sources(value), name


def test_the_attack_of_the_example_is_one() -> None:
    space: dict[str, Any] = {"dataclass": dataclass, "torch": torch, "Tensor": Tensor}
    space |= {"Attack": Attack, "Oracle": Oracle, "ThreatModel": ThreatModel, "__name__": __name__}
    exec(compile(example("docs/attacks.md"), "attacks.md", "exec"), space)
    points = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))
    points[1, 0] = 0
    victim = nn.Sequential(nn.Flatten(), nn.Linear(120, 4))
    result = space["Shrink"](epsilon=0.1)(victim, points, torch.zeros(3, dtype=torch.long))
    assert isinstance(result, attacks.AttackResult)
    torch.testing.assert_close(result.distances["point-l2"], torch.full((3,), 0.1))


def test_the_classifier_of_the_example_folds() -> None:
    space: dict[str, Any] = {"nn": nn, "Tensor": Tensor, "__name__": __name__}
    exec(example("docs/classifiers.md"), space)
    model = space["Small"](5).eval()
    model.bn1.running_mean.uniform_(-1, 1)
    model.bn1.running_var.uniform_(0.5, 2)
    points = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fold(model)(points), model(points))


def test_the_loop_of_the_example_trains_the_classifier_alone() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(256 * 3, 5))
    start = classifier[1].weight.detach().clone()
    points = torch.from_numpy(sample_box((1.0, 0.6, 0.4), 512, np.random.default_rng(1)))[None]
    space: dict[str, Any] = {"classifier": classifier, "batches": [(points, torch.tensor([2]))]}
    exec(example("docs/integration.md"), space)
    assert space["predicted"].shape == (1,) and not torch.equal(classifier[1].weight, start)
    assert all(weight.grad is None for weight in space["purifier"].parameters())
