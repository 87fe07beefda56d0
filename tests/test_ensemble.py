"""The standard attacker, and what it needs: APGD at several classes, AOF and JGBA in other norms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_checks import CLASSES, check, clouds, linear_case, victim
from torch import Tensor

from attacks import AOF, APGD, JGBA, Ensemble, Square
from attacks.base import Norm, ThreatModel

SMALL = Ensemble(delta=0.1, iterations=8, targets=2, queries=20)


def harder() -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Clouds of which attacks of few steps reach some."""
    points = clouds() * torch.linspace(0.6, 1.2, 6, dtype=torch.float64)[:, None, None]
    model = victim()
    return model, points, model(points).argmax(1)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["l2", "point-l2", "linf"])
def test_it_is_a_sound_attack(norm: Norm, targeted: bool) -> None:
    check(Ensemble(norm, delta=0.05, iterations=4, targets=2, queries=8), targeted)


@pytest.mark.parametrize("delta", [0.01, 0.02, 0.04])
def test_it_is_at_least_as_strong_as_every_member(delta: float) -> None:
    model, points, labels = harder()
    attack = Ensemble(delta=delta, iterations=8, targets=2, queries=20)
    whole = attack(model, points, labels).success
    parts = [member(model, points, labels).success for member in attack.members(40, CLASSES)]
    assert len(parts) == 6
    assert torch.equal(whole, torch.stack(parts).any(0))


def test_members_share_norm_and_budget() -> None:
    for norm, count in (("linf", 6), ("point-l2", 6), ("l2", 5)):
        attack = Ensemble(norm, delta=0.1)  # type: ignore[arg-type]
        members = attack.members(40, CLASSES)
        assert len(members) == count  # Square has no l2
        assert {(part.threat.norm, part.budget(40)) for part in members} == {(norm, attack.budget(40))}
    assert len(SMALL.members(40, 3)) == 5  # the targeted DLR needs 4 classes
    assert SMALL.with_epsilon(0.3).members(40, CLASSES)[0].budget(40) == 0.3


def test_steps_keep_their_published_share_of_the_budget() -> None:
    found = {type(part).__name__: part for part in Ensemble("point-l2", epsilon=0.16).members(1024, 40)}
    assert found["SIAdv"].step == pytest.approx(0.007)
    assert found["JGBA"].step == pytest.approx(0.016)
    # A point may move by the diagonal of a cube.
    found = {type(part).__name__: part for part in Ensemble("linf", epsilon=0.16).members(1024, 40)}
    assert found["SIAdv"].step == pytest.approx(0.007 * 3**0.5)


def test_misclassified_clouds_are_not_changed() -> None:
    model, points, labels = harder()
    labels = labels.clone()
    labels[:3] = (labels[:3] + 1) % CLASSES
    result = SMALL(model, points, labels)
    assert torch.equal(result.points[:3], points[:3])
    assert result.success[:3].all()
    assert result.iterations[:3].tolist() == [0, 0, 0]
    assert result.queries[:3].tolist() == [2, 2, 2]  # the clean cloud, and the final check


def test_defaults() -> None:
    assert Ensemble().threat == ThreatModel("white-box", "both", "shift", "linf", 0.05)
    names = [type(part).__name__ for part in Ensemble().members(1024, 40)]
    assert names == ["APGD", "APGD", "SIAdv", "JGBA", "AOF", "Square"]
    assert Ensemble().members(1024, 40)[1] == APGD("linf", epsilon=0.05, loss="dlr", targets=9)
    assert Ensemble().members(1024, 40)[-1] == Square(epsilon=0.05, queries=5000)


# Several classes to aim at


def fan(points: Tensor) -> Tensor:
    """Four classes, linear in the mean: 0 at the origin, 1 near, 2 further away, 3 out of reach."""
    mean = points.mean(1)
    gaps = torch.stack([mean[:, 0] - 1, mean[:, 1] - 2, mean[:, 2] * 0 - 9], 1)
    return torch.cat([torch.zeros_like(mean[:, :1]), gaps], 1)


def test_the_loss_aims_at_the_strongest_classes_in_turn() -> None:
    points, labels = torch.zeros(1, 5, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    attack = APGD("linf", epsilon=1.1, loss="dlr", iterations=10, targets=1)
    near = attack(fan, points, labels)
    assert near.success.all()
    assert fan(near.points).argmax(1) == 1

    def walled(points: Tensor) -> Tensor:
        """Class 1 is the second strongest at first, but never wins."""
        logits = fan(points)
        return torch.cat([logits[:, :1], logits[:, 1:2].clamp_max(-0.5), logits[:, 2:]], 1)

    far = APGD("linf", epsilon=2.2, loss="dlr", iterations=10, targets=1)
    assert not far(walled, points, labels).success.any()
    both = APGD("linf", epsilon=2.2, loss="dlr", iterations=10, targets=2)(walled, points, labels)
    assert both.success.all()
    assert walled(both.points).argmax(1) == 2


def test_any_misclassification_is_a_success_on_the_way_to_a_class() -> None:
    """Moving towards class 2 makes the cloud one of class 1 first."""

    def passing(points: Tensor) -> Tensor:
        mean = points.mean(1)[:, 0]
        low = torch.full_like(mean, -9)
        return torch.stack([torch.zeros_like(mean), 3 * mean - 2, 10 * mean - 1.5 - 20 * (1 - mean), low], 1)

    points, labels = torch.zeros(1, 5, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    result = APGD("linf", epsilon=0.7, loss="dlr", iterations=20, targets=3)(passing, points, labels)
    assert result.success.all()
    assert passing(result.points).argmax(1) == 1


def test_more_classes_than_there_are_do_no_harm() -> None:
    model, points, labels = harder()
    few, many = (APGD("linf", delta=0.02, iterations=8, targets=n) for n in (CLASSES - 1, 9))
    assert torch.equal(few(model, points, labels).points, many(model, points, labels).points)


def test_targets_do_not_matter_to_a_targeted_attack() -> None:
    model, points, labels = harder()
    aims = (labels + 1) % CLASSES
    one, two = (APGD("linf", delta=0.05, iterations=8, targets=n) for n in (0, 3))
    assert torch.equal(one(model, points, labels, aims).points, two(model, points, labels, aims).points)


# Other norms


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "attack",
    [AOF(restarts=1, iterations=8, neighbours=8), JGBA(step=0.05, iterations=8)],
    ids=["aof", "jgba"],
)
def test_structural_attacks_keep_other_budgets(attack: AOF | JGBA, norm: Norm) -> None:
    check(dataclasses.replace(attack, norm=norm, epsilon=0.3))


def test_jgba_fills_the_cube_of_a_linear_model() -> None:
    model, points, labels, normal = linear_case()
    result = JGBA(0.1, iterations=80, norm="linf")(model, points, labels)
    torch.testing.assert_close(
        result.points - points, (0.1 * normal.sign()).expand_as(points), rtol=0, atol=1e-9
    )
