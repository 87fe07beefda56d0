"""The measurement of attackers who know the defence: what each of them sees, and the worst of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import adaptive, protocol
from benchmarks.adaptive import ATTACKERS, DRAWS, FRESH, row, rows_of, table
from benchmarks.protocol import Bench, Victim
from classifiers import fold
from classifiers.pointnet import PointNet
from ifdefense.data.cloudset import CloudSet
from ifdefense.provenance import digest_of_weights
from ifdefense.purifiers.base import Outcome, Purifier

SEEDS: list[int] = []


class Shaken(Purifier):
    """Adds noise and remembers the seeds it was called with."""

    name = "shaken"
    differentiable = True

    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        SEEDS.append(seed)
        noise = torch.randn(clouds[0].shape, generator=torch.Generator().manual_seed(seed))
        return [Outcome(cloud + 0.1 * noise) for cloud in clouds]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(12, 64, 3)).astype(np.float32)
    whole = CloudSet(points, np.arange(12) % 3, np.array([str(i) for i in range(12)]), ("a", "b", "c"))
    monkeypatch.setattr(protocol, "_whole", lambda split: whole)
    for module in (protocol, adaptive):
        monkeypatch.setattr(module, "purifier_of", lambda *_: Shaken())
    SEEDS.clear()
    return Bench("validation", 6, 0, tmp_path, batch=6)


def victim() -> Victim:
    torch.manual_seed(0)
    model = PointNet(3, feature_transform=False).eval()
    return Victim("pointnet", fold(model), digest_of_weights(model))


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("plain", set()),
        ("known", {0}),
        ("exact", {0}),
        ("eot-1", {1, 2, 3}),
        ("eot-8", set(range(1, 25))),
    ],
)
def test_attackers_see_the_draws_that_they_know_and_defenders_others(
    bench: Bench, name: str, seeds: set[int]
) -> None:
    row(bench, victim(), "sor", (name,), 3)
    fresh = {FRESH + draw for draw in range(DRAWS)}
    assert set(SEEDS) - {0} == (seeds | fresh) - {0}
    assert not seeds & fresh


def test_equal_draws_are_not_averaged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("plain", "known", "eot-8")
    assert set(row(bench, victim(), "none", names, 1)["figures"]) == {"clean", "plain", "known", "worst"}
    monkeypatch.setattr(Shaken, "deterministic", True)
    assert set(row(bench, victim(), "sor", names, 1)["figures"]) == {"clean", "plain", "known", "worst"}


def test_the_worst_is_at_most_every_single_one_and_exact_gradients_need_a_differentiable_method(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = row(bench, victim(), "sor", ("plain", "known"), 4)
    figures = made["figures"]
    for kind in ("known", "fresh", "mean"):
        each = [figures[name][kind]["accuracy"] for name in ("clean", "plain", "known")]
        assert figures["worst"][kind]["accuracy"] <= min(each)
    monkeypatch.setattr(Shaken, "differentiable", False)
    assert "exact" not in row(bench, victim(), "sor", ("exact",), 1)["figures"]
    header, lines = rows_of({"rows": [made]})
    assert header[3:] == ["clean", ATTACKERS["plain"].title, ATTACKERS["known"].title, "worst"]
    assert lines[0][-1] == " / ".join(
        f"{figures['worst'][kind]['accuracy']:.0f}" for kind in ("fresh", "mean")
    )
    assert "4 steps" in table({"rows": [made]})


def test_attacked_clouds_are_made_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    row(bench, victim(), "sor", ("known",), 2)
    monkeypatch.setattr(adaptive.attacks.APGD, "run", None)
    row(bench, victim(), "sor", ("known",), 2)
