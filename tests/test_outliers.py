"""Statistical outlier removal against its definition; simple random sampling."""

from __future__ import annotations

import pytest
import torch

from ifdefense.stages.outliers import simple_random_sampling, statistical_outlier_removal


def naive_sor(cloud: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    squared = torch.cdist(cloud.double(), cloud.double()).square()
    value = squared.sort(1).values[:, 1 : k + 1].mean(1)
    return value <= value.mean() + alpha * value.std()


@pytest.mark.parametrize("k", [2, 10])
def test_equals_the_definition(k: int) -> None:
    clouds = torch.randn(3, 300, 3, generator=torch.Generator().manual_seed(0))
    kept = statistical_outlier_removal(clouds, k, 1.1)
    assert torch.equal(kept, torch.stack([naive_sor(cloud, k, 1.1) for cloud in clouds]))


def test_far_points_go_and_the_surface_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    sphere = torch.nn.functional.normalize(torch.randn(1000, 3, generator=generator), dim=1)
    far = 3 + torch.rand(10, 3, generator=generator)
    kept = statistical_outlier_removal(torch.cat([sphere, far])[None])[0]
    assert not kept[1000:].any()
    assert kept[:1000].float().mean() > 0.95


def test_a_regular_grid_is_kept_whole_at_any_scale() -> None:
    axis = torch.arange(6.0)
    grid = torch.cartesian_prod(axis, axis, axis)
    for scale in (1e-3, 0.1, 7.0):
        assert statistical_outlier_removal(grid[None] * scale).all()


def test_random_sampling_drops_exactly_that_many_and_the_same_by_seed() -> None:
    clouds = torch.zeros(2, 1024, 3)
    kept = simple_random_sampling(clouds, 500, seed=3)
    assert (kept.sum(1) == 524).all()
    assert torch.equal(kept, simple_random_sampling(clouds, 500, seed=3))
    assert not torch.equal(kept, simple_random_sampling(clouds, 500, seed=4))
    with pytest.raises(ValueError, match="cannot drop 1024 of 1024"):
        simple_random_sampling(clouds, 1024)
