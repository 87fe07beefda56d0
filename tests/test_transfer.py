from __future__ import annotations

import pytest
import torch
from attack_checks import SmallNet, check, clouds, victim
from torch import Tensor

from attacks import PGD, Perturb, SaliencyDrop, ThreatModel
from attacks.black_box.transfer import Transfer


def surrogate() -> SmallNet:
    """Nearly the victim."""
    torch.manual_seed(5)
    net = victim()
    for parameter in net.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return net


@pytest.mark.parametrize("targeted", [False, True])
def test_it_is_a_sound_attack_that_fools_a_similar_victim(targeted: bool) -> None:
    result = check(Transfer(PGD("linf", delta=0.4, iterations=20), surrogate()), targeted)
    assert result.success.float().mean() >= (0.3 if targeted else 0.8)
    assert result.queries.tolist() == [1] * 6
    assert result.iterations.tolist() == [20] * 6


@pytest.mark.parametrize("attack", [PGD(iterations=4), Perturb(searches=2, iterations=5), SaliencyDrop(8, 4)])
def test_it_returns_what_the_attack_makes_on_the_surrogate(attack: PGD | Perturb | SaliencyDrop) -> None:
    points, own = clouds(), surrogate()
    labels = own(points).argmax(1)
    direct = attack(own, points, labels)
    through = Transfer(attack, own)(victim(), points, labels)
    assert torch.equal(through.points, direct.points)
    assert through.distances.keys() == direct.distances.keys()
    again = Transfer(attack, own)(own, points, labels)
    assert torch.equal(again.success, direct.success)


def test_the_victim_alone_decides() -> None:
    points = clouds()
    labels = victim()(points).argmax(1)

    def immune(given: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(labels, 4).double() + 0 * given.sum()

    attack = PGD("linf", delta=0.4, iterations=20)
    assert attack(victim(), points, labels).success.any()
    assert not Transfer(attack, victim())(immune, points, labels).success.any()


def test_the_surrogate_is_attacked_in_evaluation_mode_and_found_unchanged() -> None:
    own, points = surrogate().train(), clouds()
    before = {key: value.clone() for key, value in own.state_dict().items()}
    Transfer(PGD(iterations=3), own)(victim(), points, torch.zeros(6, dtype=torch.long))
    assert own.training and all(parameter.requires_grad for parameter in own.parameters())
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())


def test_its_threat_model_is_the_attacks_without_knowledge() -> None:
    attack = Transfer(PGD("linf", epsilon=0.05), surrogate())
    assert attack.threat == ThreatModel("transfer", "both", "shift", "linf", 0.05)
    assert attack.budget(40) == 0.05
    assert Transfer(SaliencyDrop(7), surrogate()).threat.count == 7
    assert "SmallNet" not in repr(attack) and "epsilon=0.05" in repr(attack)


def test_goals_of_the_attack_are_kept() -> None:
    points = clouds()
    labels = torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError, match="untargeted attack"):
        Transfer(SaliencyDrop(7), surrogate())(victim(), points, labels, labels + 1)
