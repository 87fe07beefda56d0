"""The examples in the docstrings of what is public: each name has one, and they run.

They use the names of `setup`: two small clouds, their labels, a small classifier, and the packages.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sample_box
from torch import nn

from ifdefense.purifiers.registry import LACKING

PACKAGES = ("ifdefense", "attacks", "classifiers")
"""All that they export is public, and part of `setup`."""

MODULES = (
    "attacks.functional.distances",
    "attacks.functional.losses",
    "attacks.functional.noise",
    "attacks.functional.projections",
    "attacks.functional.selection",
    "ifdefense.attributes",
    "ifdefense.checkpoints",
    "ifdefense.corruptions.combined",
    "ifdefense.corruptions.planted",
    "ifdefense.corruptions.simulated",
    "ifdefense.geometry.axes",
    "ifdefense.geometry.frame",
    "ifdefense.geometry.normals",
    "ifdefense.geometry.points",
    "ifdefense.geometry.sampling",
    "ifdefense.logits",
    "ifdefense.purifiers.base",
    "ifdefense.purifiers.filters",
    "ifdefense.purifiers.mapped",
    "ifdefense.purifiers.pretrained",
    "ifdefense.purifiers.registry",
    "ifdefense.purifiers.specs",
    "ifdefense.purifiers.surface",
    "ifdefense.restorers.mesh",
    "ifdefense.restorers.optimised",
    "ifdefense.restorers.ridge",
    "ifdefense.shapes.procedural",
    "ifdefense.stages.anomaly",
    "ifdefense.stages.density",
    "ifdefense.stages.extraction",
    "ifdefense.stages.outliers",
    "ifdefense.stages.repair",
    "ifdefense.stages.resampling",
    "ifdefense.transforms",
)
"""All classes and functions that they define are public, except for those of `INNER`."""

NAMES = (
    "classifiers.dgcnn.DGCNN",
    "classifiers.geometric.FromGeometric",
    "classifiers.options.ClassifierOptions",
    "classifiers.pct.PCT",
    "classifiers.pointconv.PointConv",
    "classifiers.pointmlp.PointMLP",
    "classifiers.pointnet.PointNet",
    "classifiers.pointnet2.PointNet2",
    "classifiers.upright.Upright",
    "ifdefense.corruptions.natural.corrupt",
    "ifdefense.implicit.anomaly.AnomalyNetwork",
    "ifdefense.implicit.base.Calibration",
    "ifdefense.implicit.base.ImplicitNetwork",
    "ifdefense.implicit.base.field_of",
    "ifdefense.implicit.base.load_network",
    "ifdefense.implicit.convolutional.ConvolutionalNetwork",
    "ifdefense.implicit.local.LocalOccupancyNetwork",
    "ifdefense.implicit.occupancy.OccupancyNetwork",
    "ifdefense.point_networks.autoencoder.AutoEncoder",
    "ifdefense.point_networks.punet.PUNet",
    "ifdefense.provenance.digest",
    "ifdefense.provenance.digest_of_weights",
    "ifdefense.provenance.versions",
    "ifdefense.structures.registry.adapter_of",
)
"""What is public of other modules."""

INNER = frozenset(
    {
        "ifdefense.attributes.nearest_index",
        "ifdefense.checkpoints.load_pickle",
        "ifdefense.checkpoints.unlike",
        "ifdefense.geometry.points.farthest_samples",
        "ifdefense.geometry.points.kth_smallest",
        "ifdefense.geometry.points.lower_median",
        "ifdefense.geometry.points.nearest_squared",
        "ifdefense.geometry.points.neighbours_of_each",
        "ifdefense.geometry.points.root",
        "ifdefense.geometry.points.stacked",
        "ifdefense.logits.apart",
        "ifdefense.logits.placed",
        "ifdefense.purifiers.base.usable",
        "ifdefense.purifiers.filters.chosen",
        "ifdefense.purifiers.filters.refilled",
        "ifdefense.purifiers.registry.unknown",
        "ifdefense.restorers.optimised.Problem",
        "ifdefense.restorers.optimised.Solver",
        "ifdefense.restorers.ridge.chosen",
        "ifdefense.stages.repair.checked_evidence",
        "ifdefense.stages.repair.cut_out",
        "ifdefense.stages.repair.marked_pieces",
    }
)
"""Names that only other modules of the library use."""

NEEDS = {"classifiers.geometric": "torch_geometric", "ifdefense.transforms": "torch_geometric"}
"""Packages that the examples of a module need."""

NEEDS_WEIGHTS = {f"ifdefense.purifiers.pretrained.{name.replace('-', '_')}" for name in LACKING}
"""Functions whose weights are not shipped."""

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> Iterator[tuple[str, Any]]:
    """Public classes and functions, by the name of their definition."""
    for name in (*PACKAGES, "ifdefense.data.formats"):
        package = importlib.import_module(name)
        found = (getattr(package, each) for each in package.__all__)
        yield from ((_name(each), each) for each in found if _documented(each))
    for name in NAMES:
        module, _, key = name.rpartition(".")
        yield name, getattr(importlib.import_module(module), key)
    for name in MODULES:
        for key, each in vars(importlib.import_module(name)).items():
            if not key.startswith("_") and _documented(each) and each.__module__ == name:
                yield _name(each), each


def _documented(value: object) -> bool:
    return inspect.isfunction(value) or (inspect.isclass(value) and not issubclass(value, Exception))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


PUBLIC = {name: value for name, value in public() if name not in INNER}


def docstrings(value: Any) -> Iterator[tuple[str, str]]:
    """Own docstrings of a class or function and of its public methods."""
    yield "", inspect.cleandoc(value.__doc__ or "")
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        plain = inspect.unwrap(getattr(member, "__func__", member))
        if not key.startswith("_") and inspect.isfunction(plain):
            yield f".{key}", inspect.cleandoc(plain.__doc__ or "")


class Pooled(nn.Module):
    """Four classes, by the largest features of the points."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.layer(points).amax(1)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    points = torch.from_numpy(np.stack([sample_box((1, 0.7, 0.5), 64, rng) for _ in range(2)]))
    classifier = Pooled().eval()
    labels = classifier(points).argmax(1)
    packages = {name: importlib.import_module(name) for name in PACKAGES}
    return {
        "np": np,
        "torch": torch,
        "points": points,
        "labels": labels,
        "classifier": classifier,
        **packages,
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name: str, setup: dict[str, Any]) -> None:
    value = PUBLIC[name]
    if (needed := NEEDS.get(value.__module__)) is not None:
        pytest.importorskip(needed)
    if name in NEEDS_WEIGHTS:
        pytest.skip("its weights are not shipped")
    own, *_ = docstrings(value)
    assert ">>> " in own[1], f"{name} has no example"
    for inner, text in docstrings(value):
        space = {**vars(importlib.import_module(value.__module__)), **setup}
        test = doctest.DocTestParser().get_doctest(text, space, name + inner, None, None)
        lines = sum(example.source.count("\n") for example in test.examples)
        assert lines <= 5, f"the example of {name}{inner} has {lines} lines"
        report: list[str] = []
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
        assert not report, "".join(report)


def test_an_example_that_is_wrong_is_noticed(setup: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(">>> points.shape\ntorch.Size([3, 3])", setup, "x", None, None)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert "Got:\n    torch.Size([2, 64, 3])" in "".join(report)


def test_names_that_are_left_out_exist() -> None:
    names = {name for name, _ in public()}
    assert names >= INNER
