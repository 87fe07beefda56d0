"""Certified accuracy: a vote of a classifier over disjoint groups of points, and attacks on it.

PointCert, Zhang et al., 2023, `arXiv:2303.01959 <https://arxiv.org/abs/2303.01959>`_. A hash of its
coordinates alone assigns each point to a group, so adding or dropping a point changes one group, and thus one
vote. The vote therefore holds for as many points as half of its lead, whatever the attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import AddCD, Attack, SaliencyDrop
from attacks.oracle import Model
from benchmarks import statistics
from benchmarks.probing import Labelled, Victim
from ifdefense.arguments import integer
from ifdefense.geometry.points import gather
from ifdefense.logits import classify, frozen
from ifdefense.provenance import ByCode

AMOUNTS = (0, 1, 2, 4, 8, 16, 32)
"""Numbers of added or dropped points in the curves."""

_ODD = (-7046029254386353131, -4417276706812531889)  # multipliers of splitmix64 and xxHash
_BATCH = 512  # groups classified at once


class Voting(ByCode, nn.Module):
    """Votes of a classifier on disjoint groups of the points, as logits.

    Every group is repeated or cut to the same number of points, in an order given by the hash. An empty group
    has no vote. Gradients are those of the mean probabilities of the groups.

    Args:
        classifier: ``(B, M, 3)`` clouds to logits.
        groups: number of groups; more of them certify more points, but see fewer each.
        size: points of a group as given to the classifier. Independent of the cloud, since otherwise a single
            point would change all groups.
    """

    places_clouds = True
    """See `ifdefense.logits.classify`."""

    def __init__(self, classifier: Model, groups: int = 16, size: int = 128) -> None:
        super().__init__()
        self.classifier = classifier
        self.groups = integer("groups", groups, 1)
        self.size = integer("size", size, 1)

    def forward(self, points: Tensor) -> Tensor:
        """``(B, classes)`` votes of clouds ``(B, N, 3)``, in the classifier's frame."""
        parts, filled = grouped(points, self.groups, self.size)
        logits = torch.cat([classify(self.classifier, part) for part in parts.flatten(0, 1).split(_BATCH)])
        hard = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        soft = logits.softmax(1)
        votes = (hard + (soft - soft.detach())).unflatten(0, filled.shape)
        total: Tensor = (votes * filled[..., None]).sum(1)
        return total


def group_of(points: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Group ``(B, N)`` of each point and its hash, from its coordinates in float32."""
    bits = (points.detach().float() + 0.0).view(torch.int32).long()  # -0 + 0 is 0
    value = torch.zeros_like(bits[..., 0])
    for axis in range(3):
        value = (value ^ bits[..., axis]) * _ODD[0]
        value = (value ^ (value >> 29)) * _ODD[1]
        value = value ^ (value >> 32)
    return value.remainder(groups), value


def grouped(points: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Disjoint groups of the points.

    Args:
        points: ``(B, N, 3)``.
        groups: number of groups.
        size: points per group, by repeating or leaving out some.

    Returns:
        ``(B, groups, size, 3)`` points, each group a function of the points that the hash assigns to it, and
        the ``(B, groups)`` mask of groups that have any.
    """
    group, value = group_of(points, groups)
    order = value.argsort(dim=1)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    counts = torch.zeros_like(group[:, :1]).repeat(1, groups).scatter_add_(1, group, torch.ones_like(group))
    place = torch.arange(size, device=points.device) % counts.clamp_min(1)[..., None]
    place = place + (counts.cumsum(1) - counts)[..., None]
    index = order.gather(1, place.flatten(1).clamp_max(points.shape[1] - 1))
    return gather(points, index).unflatten(1, (groups, size)), counts > 0


def certificates(votes: Tensor, labels: Tensor) -> Tensor:
    """``(B,)`` added or dropped points, in any mixture, that cannot change a correct vote; -1 if it is wrong.

    ``floor(min_l (v_y - v_l - [l < y]) / 2)`` over the other classes l, as ties go to the first class
    (theorem 1 of PointCert with one changed group per point).

    Args:
        votes: ``(B, classes)`` whole numbers of votes.
        labels: ``(B,)`` classes.
    """
    labels = labels.to(votes.device)
    own = votes.gather(1, labels[:, None])
    classes = torch.arange(votes.shape[1], device=votes.device)
    lead = own - votes - (classes < labels[:, None]).to(votes)
    lead = lead.scatter(1, labels[:, None], torch.inf).amin(1)
    return (lead / 2).floor().clamp_min(-1).long()


def certified(
    victim: Victim,
    clouds: Labelled,
    *,
    groups: int = 16,
    amounts: Sequence[int] = AMOUNTS,
    seed: int = 0,
) -> dict[str, Any]:
    """Certified accuracy of the vote against the number of points, beside that under attacks.

    Args:
        victim: the classifier that votes.
        clouds: labelled clouds in its frame.
        groups: number of groups.
        amounts: numbers of added or dropped points.
        seed: seed of the attacks.

    Returns:
        JSON-serialisable lists over ``amounts``: ``certified``, with its ``error``, ``empirical_add`` and
        ``empirical_drop``, accuracies in %.
    """
    model = Voting(victim.model, groups)
    points, labels = clouds.points, clouds.labels
    with frozen(victim.model), torch.no_grad():
        held = certificates(model(points), labels)
    curve = [statistics.accuracy(held >= amount, labels) for amount in amounts]
    found: dict[str, Any] = {
        "victim": victim.title,
        "defence": "voting",
        "groups": groups,
        "clouds": len(points),
        "removed_or_added": list(amounts),
        "certified": [point["accuracy"] for point in curve],
        "error": [point["error"] for point in curve],
    }
    for name, attack in (("empirical_add", _adding), ("empirical_drop", _dropping)):
        right, accuracies = held >= 0, []
        for amount in amounts:
            if amount and right.any():  # with more points an attacker can do what he can with fewer
                rows = right.nonzero().squeeze(1)
                generator = torch.Generator().manual_seed(seed)
                result = attack(amount)(model, points[rows], labels[rows], generator=generator)
                right = right.clone()
                right[rows] = ~result.success
            accuracies.append(statistics.accuracy(right, labels)["accuracy"])
        found[name] = accuracies
    return found


def _adding(count: int) -> Attack:
    """Points added wherever they mislead: the weight of their distance is next to nothing."""
    return AddCD(num=count, first_weight=1e-3, searches=1, iterations=30, rate=0.1, polish=1)


def _dropping(count: int) -> Attack:
    return SaliencyDrop(num=count, per_round=max(1, count // 8))
