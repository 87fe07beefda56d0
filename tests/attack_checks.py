"""Checks shared by the tests of all attacks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.base import DISTANCES, Attack, AttackResult, Norm

CLASSES = 4


class SmallNet(nn.Module):
    """A small PointNet with a batch norm and dropout, so that training mode shows."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16))
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, CLASSES))

    def forward(self, points: Tensor) -> Tensor:
        return self.head(self.local(points).amax(1))


def victim() -> SmallNet:
    """A network that has no favourite class among `clouds`, which makes it easy to fool."""
    torch.manual_seed(0)
    model = SmallNet().double().eval()
    with torch.no_grad():
        model.head[2].bias -= model(clouds()).mean(0)
    return model


def clouds() -> Tensor:
    """Six clouds on the unit sphere's surface, in double precision."""
    points = torch.randn(6, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return points / points.norm(dim=2, keepdim=True)


def carried_out(
    attack: Attack, model: Callable[[Tensor], Tensor], points: Tensor, labels: Tensor, targeted: bool
) -> AttackResult:
    return attack(model, points, labels, (labels + 1) % CLASSES if targeted else None)


def check(attack: Attack, targeted: bool = False, within: float = 1e-6) -> AttackResult:
    """Untouched input and model, a true report, the budget, equal seeds, independence of the batch.

    Args:
        attack: attack that shifts points.
        targeted: whether it is aimed.
        within: tolerance of the independence of the batch.
    """
    model, points = victim(), clouds()
    labels = model(points).argmax(1)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copies = points.clone(), labels.clone()
    calls = []

    def counting(given: Tensor) -> Tensor:
        calls.append(len(given))
        return model.eval()(given)

    result = carried_out(attack, model, points, labels, targeted)
    assert torch.equal(points, copies[0]) and torch.equal(labels, copies[1])
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key

    again = carried_out(attack, counting, points, labels, targeted)
    assert torch.equal(again.points, result.points)
    assert int(again.queries.sum()) == sum(calls)

    predicted = model.eval()(result.points).argmax(1)
    assert torch.equal(
        result.success, predicted == (labels + 1) % CLASSES if targeted else predicted != labels
    )
    assert not result.points.requires_grad
    norm, budget = attack.threat.norm, attack.budget(points.shape[1])
    assert norm is not None and budget is not None
    assert (DISTANCES[norm](result.points, points) <= budget * (1 + 1e-6)).all()

    alone = carried_out(attack, model, points[2:3], labels[2:3], targeted)
    torch.testing.assert_close(alone.points, result.points[2:3], rtol=0, atol=within)
    assert torch.equal(alone.success, result.success[2:3])
    return result


class MeanClassifier(nn.Module):
    """Two classes, linear in the mean of the points: the nearest adversarial cloud is known.

    The logits differ by ``<mean, normal> - 1``. Of all shifts that carry the mean over the distance that is
    missing, the smallest in every norm moves all points alike.
    """

    def __init__(self, normal: Tensor) -> None:
        super().__init__()
        self.normal = normal

    def forward(self, points: Tensor) -> Tensor:
        gap = points.mean(1) @ self.normal - 1
        return torch.stack([-gap, gap], 1) / 2

    def optimum(self, points: Tensor, norm: Norm) -> Tensor:
        """``(B,)`` smallest shift, in a norm, onto the boundary."""
        gap = (self(points)[:, 0] - self(points)[:, 1]).abs()
        count = points.shape[1]
        return (
            gap
            / {
                "l2": self.normal.norm() / math.sqrt(count),
                "point-l2": self.normal.norm(),
                "linf": self.normal.abs().sum(),
            }[norm]
        )


def linear_case() -> tuple[MeanClassifier, Tensor, Tensor, Tensor]:
    """A linear classifier, three clouds of its class 0 with their mean at the origin, labels, its normal."""
    normal = torch.tensor([9.0, -3.0, 6.0], dtype=torch.float64)
    points = clouds()[:3]
    points = points - points.mean(1, keepdim=True)
    return MeanClassifier(normal), points, torch.zeros(3, dtype=torch.long), normal
