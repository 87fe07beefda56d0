"""Filters that are purifiers by themselves: what they do to the points."""

from __future__ import annotations

import pytest
import torch

from ifdefense.purifiers.filters import RandomisedInput

CLOUD = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))


def test_randomised_input_keeps_that_many_points_with_noise_of_that_size() -> None:
    (outcome,) = RandomisedInput(0.5, 0.01).run([CLOUD], [None], 0)
    assert len(outcome.points) == 2000
    generator = torch.Generator().manual_seed(0)
    own = torch.randperm(4000, generator=generator)[:2000]
    noise = outcome.points - CLOUD[own]
    assert noise.std() == pytest.approx(0.01, rel=0.03)
    assert abs(float(noise.mean())) < 0.001


def test_without_jitter_the_points_are_a_subset_that_follows_the_seed() -> None:
    part = RandomisedInput(0.25, 0)
    first, again, other = (part.run([CLOUD], [None], seed)[0].points for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = {tuple(point) for point in CLOUD.tolist()}
    assert len({tuple(point) for point in first.tolist()} & rows) == 1000


def test_gradients_reach_exactly_the_points_that_are_kept() -> None:
    cloud = CLOUD.clone().requires_grad_()
    RandomisedInput(0.5, 0.01).run([cloud], [None], 3)[0].points.sum().backward()
    assert cloud.grad is not None
    assert sorted(cloud.grad[:, 0].tolist()) == [0] * 2000 + [1] * 2000


@pytest.mark.parametrize(("keep", "jitter"), [(0, 0.1), (1.5, 0.1), (0.5, -1), (0.5, float("nan"))])
def test_values_out_of_range_are_refused(keep: float, jitter: float) -> None:
    with pytest.raises(ValueError, match="keep must be in"):
        RandomisedInput(keep, jitter)
