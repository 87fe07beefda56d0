"""Simulated attacks: each corruption against its options; shapes and seeds of the mix."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial import cKDTree

from ifdefense.corruptions.simulated import SimulationOptions, simulate_attack

KINDS = ("noise", "displace", "outliers", "clusters", "holes", "salient", "cut", "uneven")
NONE = dataclasses.replace(SimulationOptions(), clean=0.0, **dict.fromkeys(KINDS, 0.0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def only(kind, **changes):
    """Options under which every cloud meets one corruption and no other."""
    return dataclasses.replace(NONE, **{kind: 1.0, **changes})


@pytest.fixture(scope="module")
def grids():
    """16 clouds of 512 points, 0.1 apart, so that a point moved by less than 0.05 is known again."""
    axis = torch.linspace(-0.35, 0.35, 8)
    grid = torch.cartesian_prod(axis, axis, axis)
    return grid.expand(16, -1, -1).clone()


@pytest.fixture(scope="module")
def blobs():
    """16 clouds of 400 random points in the unit cube."""
    return torch.rand((16, 400, 3), generator=generator(9)) - 0.5


def kept_and_lost(cloud, corrupted):
    """Which points of a cloud are left, where corruption only takes points away."""
    distance, index = cKDTree(cloud.numpy()).query(corrupted.numpy())
    assert distance.max() == 0
    kept = np.zeros(len(cloud), bool)
    kept[index] = True
    return cloud.numpy()[kept], cloud.numpy()[~kept]


def added(cloud, corrupted):
    """The corrupted points that are no points of the cloud."""
    distance, _ = cKDTree(cloud.numpy()).query(corrupted.numpy())
    return corrupted.numpy()[distance > 0]


@pytest.mark.parametrize("num_out", [1, 100, 400, 1000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clouds_keep_their_number_their_size_and_their_dtype(blobs, num_out, dtype):
    found = simulate_attack(blobs.to(dtype), num_out, generator())
    assert found.shape == (16, num_out or 400, 3)
    assert found.dtype == dtype
    assert found.isfinite().all()


def test_equal_generators_give_equal_clouds_and_the_input_stays(blobs):
    before, state = blobs.clone(), torch.get_rng_state()
    first, again, other = (simulate_attack(blobs, 300, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(blobs, before)
    assert torch.equal(torch.get_rng_state(), state)  # the given generator alone was drawn from


def test_without_a_generator_the_global_seed_counts(blobs):
    torch.manual_seed(5)
    first = simulate_attack(blobs)
    torch.manual_seed(5)
    assert torch.equal(simulate_attack(blobs), first)


@pytest.mark.parametrize("options", [NONE, SimulationOptions(clean=1.0)])
def test_clean_clouds_are_resampled_without_replacement_then_evenly(blobs, options):
    few = simulate_attack(blobs, 150, generator(), options)
    many = simulate_attack(blobs, 1000, generator(), options)
    for cloud, some, all_of_it in zip(blobs, few, many, strict=True):
        assert len(some.unique(dim=0)) == 150
        kept, _ = kept_and_lost(cloud, some)
        assert len(kept) == 150
        found, counts = all_of_it.unique(dim=0, return_counts=True)
        assert len(found) == 400
        assert set(counts.tolist()) == {2, 3}


def test_the_choice_of_points_is_fair(blobs):
    cloud = blobs[:1].expand(2000, -1, -1)
    found = simulate_attack(cloud, 100, generator(), NONE).reshape(-1, 3)
    _, index = cKDTree(blobs[0].numpy()).query(found.numpy())
    share = np.bincount(index, minlength=400) / 2000
    assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_a_share_of_clouds_stays_clean(blobs):
    options = only("noise", clean=0.3)
    found = simulate_attack(blobs[:1].expand(2000, -1, -1), 1, generator(), options)
    untouched = np.mean([len(added(blobs[0], cloud)) == 0 for cloud in found])
    assert abs(untouched - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)


def test_noise_has_a_deviation_of_its_own_up_to_the_largest(grids):
    found = simulate_attack(grids, None, generator(), only("noise", noise_sigma=0.01))
    sigmas = []
    for grid, cloud in zip(grids, found, strict=True):
        _, index = cKDTree(grid.numpy()).query(cloud.numpy())
        sigmas.append((cloud.numpy() - grid.numpy()[index]).std())
    assert max(sigmas) < 0.0105
    assert np.ptp(sigmas) > 0.006
    assert len(np.unique(index)) == 512


def test_moves_are_few_and_bounded(grids):
    found = simulate_attack(
        grids, None, generator(), only("displace", displace_share=0.2, displace_length=0.04)
    )
    shares = []
    for grid, cloud in zip(grids, found, strict=True):
        distance, _ = cKDTree(grid.numpy()).query(cloud.numpy())
        assert distance.max() <= 0.04 + 1e-6
        shares.append((distance > 1e-7).mean())
    assert 0.1 < max(shares) < 0.2 + 4 * np.sqrt(0.2 * 0.8 / 512)


def test_outliers_are_a_bounded_share_and_stay_in_the_cube(blobs):
    found = simulate_attack(blobs, None, generator(), only("outliers", outlier_share=0.1))
    shares = [len(added(cloud, corrupted)) / 400 for cloud, corrupted in zip(blobs, found, strict=True)]
    assert 0.03 < max(shares) < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 400)
    assert found.abs().max() <= 0.5


def test_a_cluster_is_a_ball_near_the_cloud(blobs):
    options = only("clusters", cluster_count=1, cluster_share=0.3, cluster_radius=0.05, cluster_offset=0.1)
    found = simulate_attack(blobs, None, generator(), options)
    sizes = []
    for cloud, corrupted in zip(blobs, found, strict=True):
        ball = added(cloud, corrupted)
        sizes.append(len(ball))
        if len(ball) > 1:
            assert np.linalg.norm(ball[:, None] - ball[None], axis=2).max() <= 0.1 + 1e-6
    assert 40 < max(sizes) < 400 * (0.3 + 4 * np.sqrt(0.3 * 0.7 / 400))


def test_no_clusters_are_added_where_none_are_allowed(blobs):
    found = simulate_attack(blobs, None, generator(), only("clusters", cluster_share=0.0))
    assert all(len(added(*pair)) == 0 for pair in zip(blobs, found, strict=True))


def test_a_hole_is_the_neighbourhood_of_a_point(blobs):
    found = simulate_attack(blobs, None, generator(), only("holes", hole_count=1, hole_share=0.3))
    sizes = []
    for cloud, corrupted in zip(blobs, found, strict=True):
        kept, lost = kept_and_lost(cloud, corrupted)
        sizes.append(len(lost))
        if len(lost):
            to_lost = np.linalg.norm(lost[:, None] - lost[None], axis=2).max(axis=1)
            to_kept = np.linalg.norm(lost[:, None] - kept[None], axis=2).min(axis=1)
            assert (to_lost < to_kept).any()
    assert 40 < max(sizes) <= 120


def test_several_holes_share_the_loss(blobs):
    found = simulate_attack(blobs, None, generator(), only("holes", hole_count=4, hole_share=0.3))
    losses = [len(kept_and_lost(*pair)[1]) for pair in zip(blobs, found, strict=True)]
    assert 20 < max(losses) <= 120


def test_a_cut_is_a_half_space(blobs):
    found = simulate_attack(blobs, None, generator(), only("cut", cut_share=0.4))
    sizes = []
    for cloud, corrupted in zip(blobs, found, strict=True):
        kept, lost = kept_and_lost(cloud, corrupted)
        sizes.append(len(lost))
        rows = np.concatenate([-lost, kept])  # lost . n - b >= 1 and kept . n - b <= -1
        rows = np.column_stack([rows, np.repeat([1.0, -1.0], [len(lost), len(kept)])])
        plane = linprog(np.zeros(4), A_ub=rows, b_ub=-np.ones(len(rows)), bounds=(None, None))
        assert plane.status == 0
    assert 40 < max(sizes) <= 160


def test_salient_loss_takes_what_is_far_from_the_centre(blobs):
    found = simulate_attack(blobs, None, generator(), only("salient", salient_share=0.25))
    sizes = []
    for cloud, corrupted in zip(blobs, found, strict=True):
        kept, lost = kept_and_lost(cloud, corrupted)
        sizes.append(len(lost))
        if len(lost) > 10:
            assert np.linalg.norm(lost, axis=1).mean() > np.linalg.norm(kept, axis=1).mean()
    assert 40 < max(sizes) <= 100


def test_uneven_density_crowds_about_a_point(blobs):
    even = simulate_attack(blobs, 60, generator(), NONE)
    uneven = simulate_attack(blobs, 60, generator(), only("uneven", uneven_rate=20.0))
    spread = [torch.stack([torch.pdist(cloud).mean() for cloud in clouds]) for clouds in (even, uneven)]
    assert (spread[1] < spread[0]).float().mean() > 0.9
    assert spread[1].mean() < 0.85 * spread[0].mean()


def test_every_cloud_meets_a_mix_of_its_own(blobs):
    found = simulate_attack(blobs[:1].expand(64, -1, -1), 400, generator())
    assert len(torch.unique(found.reshape(64, -1), dim=0)) == 64
    changed = [len(added(blobs[0], cloud)) / 400 for cloud in found]
    assert min(changed) == 0
    assert max(changed) == 1


def test_all_points_in_one_place_do_no_harm():
    found = simulate_attack(torch.zeros(4, 20, 3), 30, generator())
    assert found.shape == (4, 30, 3)
    assert found.isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_tiny_clouds_keep_at_least_a_point(size):
    most = SimulationOptions(
        clean=0, holes=1, salient=1, cut=1, hole_share=0.33, salient_share=0.33, cut_share=0.33
    )
    cloud = torch.rand((200, size, 3), generator=generator())
    assert simulate_attack(cloud, 4, generator(), most).isfinite().all()


@pytest.mark.parametrize("shape", [(10, 3), (2, 3, 10), (2, 0, 3)])
def test_points_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"points must be \(B, N, 3\) with N > 0, got"):
        simulate_attack(torch.zeros(shape))


def test_no_points_out_are_refused(blobs):
    with pytest.raises(ValueError, match="num_out must be at least 1, got 0"):
        simulate_attack(blobs, 0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"noise": 1.5}, r"noise is 1\.5, outside \[0, 1\]"),
        ({"outlier_share": -0.1}, r"outlier_share is -0\.1, outside \[0, 1\]"),
        ({"noise_sigma": -1.0}, r"noise_sigma is -1\.0, outside \[0, inf\)"),
        ({"cluster_count": 0}, "cluster_count is 0, it must be at least 1"),
        ({"hole_share": 0.5, "cut_share": 0.5}, "together must stay below 1"),
    ],
)
def test_options_out_of_range_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        SimulationOptions(**changes)
