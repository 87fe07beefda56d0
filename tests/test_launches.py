"""What an accelerator would launch and wait for, counted on the stand-in."""

from __future__ import annotations

import fake_device
import pytest
import torch

import ifdefense
from ifdefense.geometry.points import farthest_point_sampling, farthest_samples, neighbours_of_each
from ifdefense.shapes.procedural import make_dataset

CLOUDS = 16


@pytest.mark.parametrize(("method", "launches"), [("local-mesh", 1000), ("dup-net", 500)])
def test_a_batch_takes_few_launches_and_waits_per_cloud(
    method: str, launches: int, stand_in: torch.device
) -> None:
    clouds = torch.from_numpy(make_dataset(1, 1024, seed=5).points[:CLOUDS])
    assert clouds.shape == (CLOUDS, 1024, 3)
    purifier = ifdefense.load(method)
    expected = purifier(clouds[:2])
    purifier.to(stand_in)
    clouds = clouds.to(stand_in)
    with fake_device.watch() as seen:
        result = purifier(clouds)
    assert seen.count("launch") <= launches * CLOUDS, seen.table()
    assert seen.count("wait") <= 10 * CLOUDS, seen.table()
    assert seen.count("to host") <= 10 * CLOUDS, seen.table()
    # Rounding moves a point by little; a sample on another side of a bound is another point.
    apart = (result[:2].cpu() - expected).norm(dim=-1)
    assert (apart < 1e-3).float().mean() > 0.98


def test_farthest_points_of_a_small_batch_are_those_of_the_cpu_in_a_few_launches(
    stand_in: torch.device,
) -> None:
    clouds = [torch.randn(size, 3, generator=torch.Generator().manual_seed(size)) for size in (90, 64, 200)]
    nums, start = [20, 64, 50], torch.tensor([3, 0, 199])
    expected = [
        farthest_point_sampling(cloud[None], num, start=int(first))[0]
        for cloud, num, first in zip(clouds, nums, start, strict=True)
    ]
    there = [cloud.to(stand_in) for cloud in clouds]
    with fake_device.watch() as seen:
        found = farthest_samples(there, nums, start.to(stand_in))
    assert seen.count("launch") < 40
    for index, reference in zip(found, expected, strict=True):
        assert index.device == stand_in
        assert torch.equal(index.cpu(), reference)


def test_neighbours_of_clouds_of_different_sizes_are_found_by_one_search() -> None:
    generator = torch.Generator().manual_seed(0)
    sources = [torch.rand(size, 3, generator=generator) for size in (9, 30, 17)]
    queries = [torch.rand(size, 3, generator=generator) for size in (5, 1, 0)]
    for query, source, index in zip(queries, sources, neighbours_of_each(queries, sources, 4), strict=True):
        assert torch.equal(index, torch.cdist(query, source).argsort(1)[:, :4])
