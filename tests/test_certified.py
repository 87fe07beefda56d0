"""Votes over hash groups: closed forms, invariance, and certificates that no attack breaks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import certified
from benchmarks.certified import Voting, certificates, group_of, grouped


def clouds(count: int = 3, size: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(count, size, 3, generator=torch.Generator().manual_seed(seed))


class Side(nn.Module):
    """Class 1 if most points of a group are right of the origin, by the sign of their mean."""

    def forward(self, points: Tensor) -> Tensor:
        mean = points.mean(1)[:, 0]
        return torch.stack([-mean, mean], 1)


def test_groups_are_a_partition_of_about_equal_size() -> None:
    points = clouds(1, 4000)
    group, _ = group_of(points, 8)
    sizes = torch.bincount(group[0], minlength=8)
    assert sizes.sum() == 4000
    assert ((sizes - 500).abs() < 5 * (500 * 7 / 8) ** 0.5).all()
    parts, filled = grouped(points, 8, 1000)
    assert filled.all()
    for number, part in enumerate(parts[0]):
        assert torch.equal(torch.unique(part, dim=0), torch.unique(points[0][group[0] == number], dim=0))


def test_groups_are_repeated_or_cut_to_one_size() -> None:
    points = clouds(1, 40)
    counts = torch.bincount(group_of(points, 4)[0][0], minlength=4)
    parts, _ = grouped(points, 4, int(counts.max()) - 1)
    for count, part in zip(counts.tolist(), parts[0], strict=True):
        assert len(torch.unique(part, dim=0)) == min(count, part.shape[0])


def test_neither_order_nor_batch_matter_to_a_group() -> None:
    points = clouds()
    parts, _ = grouped(points, 5, 64)
    shuffled = points[:, torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(grouped(shuffled, 5, 64)[0], parts)
    assert torch.equal(grouped(points[1:2], 5, 64)[0], parts[1:2])
    assert torch.equal(grouped(points.double(), 5, 64)[0].float(), parts)


@pytest.mark.parametrize("change", ["add", "drop"])
def test_one_point_changes_one_group(change: str) -> None:
    points = clouds(1)
    other = torch.cat([points, torch.full((1, 1, 3), 0.3)], 1) if change == "add" else points[:, 1:]
    before, after = grouped(points, 10, 64)[0], grouped(other, 10, 64)[0]
    differs = (before != after).flatten(2).any(2).sum()
    assert differs == 1


def test_an_empty_group_has_no_vote() -> None:
    votes = Voting(Side(), groups=64)(clouds(2, 20))
    filled = grouped(clouds(2, 20), 64, 8)[1].sum(1)
    assert (filled < 21).all()
    assert torch.equal(votes.sum(1), filled.float())


def test_zero_has_one_hash() -> None:
    assert torch.equal(group_of(torch.zeros(1, 1, 3), 99)[1], group_of(-torch.zeros(1, 1, 3), 99)[1])


def test_certificates_by_hand() -> None:
    votes = torch.tensor([[7, 3, 0], [3, 7, 0], [6, 4, 0], [5, 5, 0], [5, 5, 0], [0, 9, 1], [10, 0, 0]])
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    # Leads of 4 (a tie is won), 3 (a tie would be lost), 2, 0, -1 (lost to the first class), wrong, and 10.
    assert certificates(votes.float(), labels).tolist() == [2, 1, 1, 0, -1, -1, 5]


def test_no_mixture_of_votes_breaks_a_certificate_and_one_more_does() -> None:
    """All ways in which an attacker may move k of the votes, which is the best that k points can do."""
    for votes in ([6, 3, 1], [3, 6, 1], [4, 4, 2], [2, 3, 5], [0, 10, 0]):
        for label in range(3):
            held = int(certificates(torch.tensor([votes]).float(), torch.tensor([label]))[0])

            def survives(moved: int, votes: list[int] = votes, label: int = label) -> bool:
                """Whether the label wins after losing ``moved`` votes to any of the others."""
                for other in {0, 1, 2} - {label}:
                    changed = torch.tensor(votes)
                    taken = min(moved, votes[label])
                    changed[label] -= taken
                    changed[other] += moved
                    if int(changed.argmax()) != label:
                        return False
                return True

            assert held == -1 or survives(held)
            assert not survives(held + 1)


def test_gradients_of_votes_are_those_of_probabilities() -> None:
    points = clouds(1).requires_grad_()
    votes = Voting(Side(), groups=4)(points)
    assert torch.equal(votes, votes.round())
    votes[0, 1].backward()
    assert points.grad is not None
    assert points.grad[0, :, 0].abs().min() > 0


def test_attacks_stay_above_the_certificate() -> None:
    torch.manual_seed(0)
    points = clouds(6, 60)
    points[..., 0] += torch.linspace(-0.6, 0.6, 6)[:, None]
    labels = (torch.linspace(-1, 1, 6) > 0).long()
    victim = SimpleNamespace(title="side", model=Side())
    found = certified.certified(
        victim, SimpleNamespace(points=points, labels=labels), groups=6, amounts=(0, 1, 4)
    )
    assert json.loads(json.dumps(found)) == found
    assert found["removed_or_added"] == [0, 1, 4]
    assert found["certified"][0] == found["empirical_add"][0] == found["empirical_drop"][0] > 50
    assert found["certified"][-1] == 0  # more than half of the groups
    for name in ("certified", "empirical_add", "empirical_drop"):
        assert sorted(found[name], reverse=True) == found[name]
        assert all(high >= low for high, low in zip(found[name], found["certified"], strict=True)), name
    assert found["empirical_add"][-1] < found["empirical_add"][0]
    assert found["empirical_drop"][-1] < found["empirical_drop"][0]
