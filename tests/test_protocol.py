"""The benchmark protocol on ModelNet40, and invalidation of its cache."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ifdefense
from attacks import FGM
from benchmarks import protocol
from benchmarks.protocol import DEFENCES, Bench, Victim
from classifiers import fold
from classifiers.pointnet import PointNet
from ifdefense import Defended, provenance
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.selection import stratified
from ifdefense.provenance import digest_of_weights
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.filters import LocalSmoothing, StatisticalOutlierRemoval
from ifdefense.purifiers.registry import METHODS

needs_modelnet40 = pytest.mark.skipif(
    "IFDEFENSE_DATA" not in os.environ, reason="IFDEFENSE_DATA is not set: no ModelNet40"
)


def test_examples_are_drawn_in_proportion_to_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 21])
    chosen = stratified(labels, 20, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [10, 6, 4]
    assert len(set(chosen.tolist())) == 20
    assert np.array_equal(chosen, stratified(labels, 20, seed=3))
    assert not np.array_equal(chosen, stratified(labels, 20, seed=4))
    assert np.array_equal(stratified(labels, 101), np.arange(101))


@pytest.mark.parametrize("count", [0, 5])
def test_more_examples_than_there_are_cannot_be_drawn(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot choose {count} of 4 examples"):
        stratified(np.zeros(4, int), count)


def test_every_method_is_a_defence() -> None:
    assert set(DEFENCES) == {"none", *METHODS}
    assert DEFENCES[:4] == ("none", "srs", "sor", "sor-smooth")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Six random clouds of three classes."""
    points = torch.randn(6, 200, 3, generator=torch.Generator().manual_seed(0)).numpy()
    names = np.array([f"{i}" for i in range(6)])
    whole = CloudSet(points, np.int64([0, 0, 1, 1, 2, 2]), names, ("a", "b", "c"))
    monkeypatch.setattr(protocol, "_whole", lambda split: whole)
    return Bench("test", 6, 0, tmp_path, batch=4)


@pytest.fixture
def purifiers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Purifier]:
    """What the defences of the protocol are, to be changed."""
    given: dict[str, Purifier] = {"sor": StatisticalOutlierRemoval()}
    monkeypatch.setattr(protocol, "purifier_of", lambda name, _: given[name])
    return given


def victim(seed: int = 0) -> Victim:
    torch.manual_seed(seed)
    model = PointNet(3, feature_transform=False).eval()
    return Victim("pointnet", fold(model), digest_of_weights(model))


class Extent(nn.Module):
    """The class is the distance of the farthest point from the origin, in tenths."""

    def forward(self, points: Tensor) -> Tensor:
        reach = points.norm(dim=2).amax(1, keepdim=True) * 10
        return -(reach - torch.arange(40)).abs()


def folders(bench: Bench, kind: str) -> set[str]:
    return {path.name for path in (bench.cache / kind).iterdir()}


def test_predictions_are_those_of_the_defended_classifier(
    bench: Bench, purifiers: dict[str, Purifier]
) -> None:
    points = bench.points * 0.5 + 1
    assert torch.equal(bench.purified(points, "none"), points)
    for purifier in (StatisticalOutlierRemoval(), LocalSmoothing()):  # the second is to be normalised
        purifiers["sor"] = purifier
        purified = bench.purified(points, "sor")
        assert torch.equal(purified, purifier(points, 200, 0))
        with torch.no_grad():
            logits = Defended(Extent(), purifier, num_points=200, seed=0)(points)
        extents = Victim("extent", Extent(), "")
        assert torch.equal(bench.predictions(extents, purified, "sor"), logits.argmax(1))
        assert torch.equal(bench.predictions(extents, purified, purifier), logits.argmax(1))
        assert not torch.equal(bench.predictions(extents, 9 * purified), logits.argmax(1))


def test_purified_clouds_are_kept_under_all_that_made_them(
    bench: Bench, purifiers: dict[str, Purifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.purified(bench.points, "sor")
    assert len(folders(bench, "purified")) == 1

    def never(*_: object) -> Tensor:
        raise AssertionError("a cached cloud is made again")

    with monkeypatch.context() as patch:
        patch.setattr(StatisticalOutlierRemoval, "run", never)
        assert torch.equal(bench.purified(bench.points, "sor"), first)
        for other in (bench.points + 1, bench.points[:, :100]):
            with pytest.raises(AssertionError, match="made again"):
                bench.purified(other, "sor")
    purifiers["sor"] = StatisticalOutlierRemoval(alpha=0.5)
    assert not torch.equal(bench.purified(bench.points, "sor"), first)
    assert len(folders(bench, "purified")) == 4
    monkeypatch.setattr(protocol, "versions", lambda: {"torch": "another"})
    bench.purified(bench.points, "sor")
    monkeypatch.setattr(provenance, "code_digest", lambda modules: "another")
    bench.purified(bench.points, "sor")
    assert len(folders(bench, "purified")) == 6


def test_attacked_clouds_are_kept_under_all_that_made_them(
    bench: Bench, purifiers: dict[str, Purifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.attacked(victim(), "fgm", FGM(), True)
    assert not torch.equal(first, bench.points)

    def never(*_: object) -> Tensor:
        raise AssertionError("a cached cloud is made again")

    with monkeypatch.context() as patch:
        patch.setattr(FGM, "run", never)
        assert torch.equal(bench.attacked(victim(), "fgm", FGM(), True), first)
        for changed in (
            {"victim": victim(1)},
            {"attack": dataclasses.replace(FGM(), delta=0.01)},
            {"targeted": False},
            {"defence": "sor"},
        ):
            usual = {"victim": victim(), "name": "fgm", "attack": FGM(), "targeted": True}
            with pytest.raises(AssertionError, match="made again"):
                bench.attacked(**{**usual, **changed})  # type: ignore[arg-type]
    count = len(folders(bench, "attacked"))
    for module, name in ((protocol, "code_digest"), (provenance, "code_digest"), (protocol, "versions")):
        monkeypatch.setattr(module, name, lambda *_: "another")
        bench.attacked(victim(), "fgm", FGM(), True)
        count += 1
        assert len(folders(bench, "attacked")) == count


def test_code_of_attack_victim_and_stages_counts(
    bench: Bench, purifiers: dict[str, Purifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    for module in (protocol, provenance):
        monkeypatch.setattr(module, "code_digest", lambda modules: seen.update(modules) or "")
    bench.attacked(victim(), "fgm", FGM(), True)
    assert {"attacks.gradient.fgm", "classifiers.pointnet"} <= seen
    purifiers["sor"] = ifdefense.load("onet-mesh")
    bench.purified(bench.points[:1], "sor")
    stages = {"ifdefense.stages.extraction", "ifdefense.stages.repair", "ifdefense.implicit.occupancy"}
    assert stages <= seen
    assert not any(name.startswith("torch") for name in seen)


def test_rates() -> None:
    hits = torch.tensor([True, True, True, False])
    assert protocol.rate(hits) == {"accuracy": 75.0, "standard_error": 21.65}


@needs_modelnet40
def test_targets_do_not_depend_on_the_number_of_clouds(tmp_path: Path) -> None:
    few, many = Bench("validation", 6, 0, tmp_path), Bench("validation", 9, 0, tmp_path)
    assert (few.targets != few.labels).all() and (many.targets != many.labels).all()
    for i, cloud in enumerate(few.points):
        same = (many.points == cloud).flatten(1).all(1).nonzero()
        assert all(many.targets[j] == few.targets[i] for j in same)
    torch.testing.assert_close(few.points.norm(dim=2).amax(1), torch.ones(6))
