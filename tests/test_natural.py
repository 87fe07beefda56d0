from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.interpolate import RBFInterpolator
from torch import Tensor

from ifdefense.corruptions import natural
from ifdefense.corruptions.natural import CORRUPTIONS, corrupt, visible


def ball(count: int = 256, batch: int = 2, seed: int = 0) -> Tensor:
    """Points on the unit sphere, in double precision."""
    points = torch.randn(batch, count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return points / points.norm(dim=2, keepdim=True)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# All of them


def test_there_are_three_families_of_five() -> None:
    families = [corruption.family for corruption in CORRUPTIONS.values()]
    assert families == ["density"] * 5 + ["noise"] * 5 + ["transformation"] * 5


PUBLISHED = {  # points of a cloud of 1,024 (density_inc: 2,048) by severity
    "lidar": [768] * 5,
    "density_dec": [949, 874, 799, 724, 649],
    "cutout": [964, 934, 874, 814, 724],
    "upsampling": [1228, 1280, 1365, 1536, 2048],
    "background": [1046, 1049, 1053, 1058, 1075],
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_sizes_are_the_published_ones(name: str) -> None:
    size = CORRUPTIONS[name].size
    given = 2048 if name == "density_inc" else 1024
    assert [size(given, severity) for severity in range(1, 6)] == PUBLISHED.get(name, [1024] * 5)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_clouds_come_in_the_stated_size_and_dtype_and_change_with_the_severity(name: str) -> None:
    points = ball(300).float()
    copy = points.clone()
    results = [corrupt(points, name, severity) for severity in range(1, 6)]
    assert torch.equal(points, copy)
    for severity, result in enumerate(results, 1):
        assert result.shape == (2, CORRUPTIONS[name].size(300, severity), 3)
        assert result.dtype == torch.float32 and result.isfinite().all()
        if CORRUPTIONS[name].normalised:
            low, high = result.amin(1), result.amax(1)
            torch.testing.assert_close((high - low).amax(1), torch.full((2,), 2.0))
            torch.testing.assert_close(low + high, torch.zeros(2, 3), rtol=0, atol=1e-5)
    for one, other in itertools.combinations(results, 2):
        assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_seeds_decide_and_batches_do_not(name: str) -> None:
    points = ball(90, batch=3)
    whole = corrupt(points, name, 3, seeded(1))
    assert torch.equal(corrupt(points, name, 3, seeded(1)), whole)
    assert not torch.equal(corrupt(points, name, 3, seeded(2)), whole)
    generator = seeded(1)
    parts = torch.cat([corrupt(part, name, 3, generator) for part in points.split(2)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    same = corrupt(points[:1].expand(2, -1, -1), name, 3, seeded(1))
    assert not torch.equal(same[0], same[1])  # every cloud draws its own


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_frame_of_the_input_can_be_kept(name: str) -> None:
    """A little severity 1 noise aside, clouds stay where they were, far from a cube of side 2."""
    points = 0.3 * ball(200) + torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
    result = corrupt(points, name, 1, normalise=False)
    if name == "background":
        result = result[:, :200]
    assert ((result - points.mean(1, keepdim=True)).norm(dim=2) < 0.3 + 0.2).all()


@pytest.mark.parametrize("name", ["shear", "occlusion", "lidar"])
def test_up_turns_the_corruption_along(name: str) -> None:
    points = ball(120) * torch.tensor([1.0, 0.6, 0.3])
    upright = corrupt(points, name, 2, seeded())
    y_up = corrupt(points[..., [1, 2, 0]], name, 2, seeded(), up="y")  # (y, z, x): z is second
    torch.testing.assert_close(y_up, upright[..., [1, 2, 0]])
    x_up = corrupt(points[..., [2, 0, 1]], name, 2, seeded(), up="x")
    torch.testing.assert_close(x_up, upright[..., [2, 0, 1]])


# Density


def rows(cloud: Tensor) -> set[tuple[float, ...]]:
    return {tuple(point) for point in cloud.tolist()}


def test_cutout_by_hand() -> None:
    points = ball(100)
    result = corrupt(points, "cutout", 2, seeded(3))
    share = torch.rand(2, 3, generator=seeded(3), dtype=torch.float64)
    for cloud, shares, left in zip(points, share, result, strict=True):
        for drawn in shares:
            distance = (cloud - cloud[int(drawn * len(cloud))]).norm(dim=1)
            cloud = cloud[distance.argsort()[3:].sort().values]  # 30 of 1,024 are 3 of 100
        assert torch.equal(left, cloud)


def test_density_dec_thins_regions_only() -> None:
    points = ball(1024, 1)
    for severity in (1, 5):
        left = corrupt(points, "density_dec", severity)[0]
        assert rows(left) < rows(points[0]) and len(rows(left)) == 1024 - 75 * severity
    one = corrupt(points, "density_dec", 1)[0]
    gone = torch.tensor(sorted(rows(points[0]) - rows(one)), dtype=torch.float64)
    # 100 of 1,024 points are a cap of 36.4 degrees; 75 lost ones and 25 others share it.
    assert torch.cdist(gone, gone).max() < 2 * math.sin(math.radians(45))


def test_density_inc_keeps_regions_whole_and_halves_the_cloud() -> None:
    points = ball(2048, 1)
    result = corrupt(points, "density_inc", 2)[0]
    region, rest = result[:100], result[200:]
    assert rows(result) <= rows(points[0])
    assert len(rows(result[:200])) == 200 and not rows(rest) & rows(result[:200])
    centre = region[0]  # the nearest to the centre is the centre
    nearest = points[0][(points[0] - centre).norm(dim=1).argsort()[:100]]
    assert rows(nearest) == rows(region)


def test_a_camera_sees_the_side_of_a_sphere_that_it_faces() -> None:
    """From 3 radii away, the polar cap of cosine 1/3."""
    points = ball(1024, 3)
    camera = 3 * ball(3, 1, seed=5).mT.contiguous().mT[0][:, None]
    cosine = (points @ camera.mT).squeeze(2) / 3
    seen = visible(points, camera)
    assert seen[cosine > 0.55].all()
    assert seen[cosine < -0.1].double().mean() < 0.04  # through gaps in the sample
    assert abs(float(seen.double().mean()) - 1 / 3) < 0.08


def test_a_wall_hides_what_is_behind_it() -> None:
    wall = torch.rand(1, 400, 3, dtype=torch.float64, generator=seeded()) - 0.5
    front, behind, beside = wall.clone(), wall[:, :50] * 0.5, wall[:, :50] * 0.2
    front[..., 2], behind[..., 2], beside[..., 2] = 1.0, 0.0, 0.0
    beside[..., 0] += 3
    points = torch.cat([front, behind, beside], 1)
    seen = visible(points, torch.tensor([[[0.0, 0.0, 4.0]]], dtype=torch.float64))[0]
    assert seen[:400].all() and seen[450:].all()
    assert seen[400:450].double().mean() <= 0.06


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_occlusion_and_lidar_look_from_the_published_places(severity: int) -> None:
    """The middle of what is seen of a sphere points to the viewer."""
    points = ball(1024, 6)
    for name, low, high in (("occlusion", 30, 60), ("lidar", 22.5, 22.5)):
        middle = corrupt(points, name, severity, normalise=False).mean(1)
        elevation = torch.rad2deg(torch.asin(middle[:, 2] / middle.norm(dim=1)))
        assert (elevation > low - 8).all() and (elevation < high + 8).all(), name
        azimuth = torch.rad2deg(torch.atan2(-middle[:, 0], middle[:, 1]))
        off = (azimuth - 72 * severity + 180) % 360 - 180
        assert (off.abs() < 36 + 8).all() and off.std() > 5, name


def test_lidar_beams_are_a_degree_apart() -> None:
    points = ball(1024, 1)
    result = corrupt(points, "lidar", 5, seeded())  # in the cube already: the sphere fills it
    turn = 2 * math.pi / 5 * 5 + math.pi / 5 * (
        2 * torch.rand(1, 1025, generator=seeded(), dtype=torch.float64)[0, 0] - 1
    )
    elevation = torch.tensor(math.pi / 8, dtype=torch.float64)
    place = torch.stack([-turn.sin() * elevation.cos(), turn.cos() * elevation.cos(), elevation.sin()])
    normalised = natural._normalised(points)[0]
    offset = result[0] - 5 * place
    polar = torch.rad2deg(torch.atan2(offset[:, :2].norm(dim=1), offset[:, 2]))
    steps = (polar - polar.min()).unique()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-6)
    assert len((steps * 1e3).round().unique()) > 10
    # Only the polar angle has changed, and by a quarter of a degree at most.
    moved = torch.cdist(result[0], normalised[0]).amin(1)
    assert moved.max() <= 6 * math.radians(0.25)


# Noise


@pytest.mark.parametrize("severity", [1, 5])
def test_uniform_and_gaussian_noise(severity: int) -> None:
    points = 0.5 * ball(4000, 1)
    noise = corrupt(points, "uniform", severity, normalise=False) - points
    assert noise.abs().max() <= 0.01 * severity
    assert abs(float(noise.std()) - 0.01 * severity / math.sqrt(3)) < 2e-4 * severity
    noise = corrupt(points, "gaussian", severity) - points
    assert abs(float(noise.std()) / (0.005 + 0.005 * severity) - 1) < 0.03
    assert abs(float((noise**4).mean() / noise.var() ** 2) - 3) < 0.3
    assert corrupt(ball(100), "gaussian", severity).abs().max() <= 1


def test_impulses_move_some_points_by_a_tenth_along_every_axis() -> None:
    points = ball(300)
    shift = corrupt(points, "impulse", 5, normalise=False) - points
    hit = (shift != 0).any(2)
    assert hit.sum(1).tolist() == [30, 30]
    torch.testing.assert_close(shift[hit].abs(), torch.full((60, 3), 0.1, dtype=torch.float64))
    assert not torch.equal(hit[0], hit[1])


def test_upsampling_and_background_only_add() -> None:
    points = ball(300)
    more = corrupt(points, "upsampling", 4, normalise=False)
    assert torch.equal(more[:, :300], points)
    distance = (more[:, 300:, None] - points[:, None]).abs().amax(3)
    assert (distance.amin(2) <= 0.05).all()
    more = corrupt(points, "background", 5, normalise=False)
    assert torch.equal(more[:, :300], points)
    assert more[:, 300:].abs().max() <= 1 and more[:, 300:].abs().max() > 0.8


# Transformation


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_rotation_turns_by_the_stated_angles(severity: int) -> None:
    points = ball(30, 40)
    turned = corrupt(points, "rotation", severity, normalise=False)
    matrix = torch.linalg.lstsq(points, turned).solution
    torch.testing.assert_close(points @ matrix, turned)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3).double().expand(40, 3, 3))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(40, dtype=torch.float64))
    # R = Rx Ry Rz: its angles are those that were drawn.
    drawn = torch.stack(
        [
            torch.atan2(-matrix[:, 1, 2], matrix[:, 2, 2]),
            torch.asin(matrix[:, 0, 2]),
            torch.atan2(-matrix[:, 0, 1], matrix[:, 0, 0]),
        ],
        1,
    )
    degrees = torch.rad2deg(drawn)
    middle = (2.5, 5, 7.5, 10, 15)[severity - 1]
    assert (degrees.abs() >= middle - 2.5 - 1e-6).all() and (degrees.abs() <= middle + 2.5 + 1e-6).all()
    assert (degrees > 0).any() and (degrees < 0).any()


@pytest.mark.parametrize("severity", [1, 5])
def test_shear_keeps_heights(severity: int) -> None:
    points = ball(30, 40)
    sheared = corrupt(points, "shear", severity, normalise=False)
    torch.testing.assert_close(sheared[..., 2], points[..., 2])
    matrix = torch.linalg.lstsq(points, sheared).solution
    torch.testing.assert_close(points @ matrix, sheared)
    torch.testing.assert_close(
        matrix.diagonal(dim1=1, dim2=2), torch.ones(40, 3, dtype=torch.float64), rtol=0, atol=1e-9
    )
    rates = torch.stack([matrix[:, 1, 0], matrix[:, 2, 0], matrix[:, 0, 1], matrix[:, 2, 1]], 1).abs()
    assert rates.min() >= 0.05 * severity - 0.05 - 1e-9 and rates.max() <= 0.05 * severity + 0.05 + 1e-9
    assert rates.max() > 0.05 * severity


def test_ffd_by_hand() -> None:
    points = 0.9 * ball(20)
    bent = corrupt(points, "ffd", 3, seeded(2), normalise=False)
    moves = 2 * 0.3 * (2 * torch.rand(2, 375, generator=seeded(2), dtype=torch.float64) - 1)
    moves = moves.reshape(2, 5, 5, 5, 3)

    def bernstein(i: int, t: float) -> float:
        return math.comb(4, i) * t**i * (1 - t) ** (4 - i)

    for cloud, lattice, result in zip(points, moves, bent, strict=True):
        for point, moved in zip(cloud, result, strict=True):
            x, y, z = ((point + 1) / 2).tolist()
            expected = point.clone()
            for i, j, k in itertools.product(range(5), repeat=3):
                expected += bernstein(i, x) * bernstein(j, y) * bernstein(k, z) * lattice[i, j, k]
            torch.testing.assert_close(moved, expected)
    outside = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert torch.equal(corrupt(outside, "ffd", 5, normalise=False)[0, 0], outside[0, 0])


@pytest.mark.parametrize(("name", "kernel"), [("rbf", "multiquadric"), ("inv_rbf", "inverse_multiquadric")])
def test_radial_basis_functions_agree_with_scipy(name: str, kernel: str) -> None:
    points = ball(40, 1)
    line = torch.linspace(-1, 1, 5, dtype=torch.float64)
    control = torch.cartesian_prod(line, line, line)
    bent = corrupt(torch.cat([control[None], points], 1), name, 4, seeded(6), normalise=False)[0]
    moves = bent[:125] - control
    torch.testing.assert_close(moves.norm(dim=1), torch.full((125,), 0.1, dtype=torch.float64))
    # SciPy's are functions of r / 0.5, times a constant: the interpolant is the same.
    inter = RBFInterpolator(control.numpy(), moves.numpy(), kernel=kernel, epsilon=2.0, degree=1)
    expected = points[0].numpy() + inter(points[0].numpy())
    np.testing.assert_allclose(bent[125:].numpy(), expected, atol=1e-9)


def test_random_numbers() -> None:
    draw = natural.Draw(ball(4, 3), 4000, seeded())
    normal = draw.normal(2000)
    assert abs(float(normal.mean())) < 0.05 and abs(float(normal.std()) - 1) < 0.05
    subset = draw.subset(100, 40)
    assert all(len(set(part)) == 40 and max(part) < 100 for part in subset.tolist())
    assert set(draw.index(5, 100).flatten().tolist()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(draw.directions(50).norm(dim=2), torch.ones(3, 50, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="2000 random numbers are requested, 1700 are left"):
        draw.uniform(2000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(ball(), "fog", 1), "no corruption 'fog'; there are: occlusion, lidar, density_inc"),
        (lambda: corrupt(ball(), "shear", 0), "severity must be 1, 2, 3, 4 or 5, got 0"),
        (lambda: corrupt(ball(), "shear", 6), "got 6"),
        (lambda: corrupt(ball(), "shear", 1, up="w"), "up must be x, y or z, got 'w'"),
        (lambda: corrupt(ball()[0], "shear", 1), r"shape \(B, N, 3\), got \(256, 3\)"),
        (lambda: corrupt(ball().long(), "shear", 1), "floating-point"),
        (lambda: corrupt(ball() / 0, "shear", 1), "example 0 has NaN or infinite"),
        (lambda: corrupt(ball(15), "cutout", 1), "cutout needs clouds of at least 16 points, got 15"),
        (lambda: corrupt(torch.ones(1, 20, 3), "uniform", 1), "example 0 has no extent"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_smallest_clouds_work(name: str) -> None:
    least = CORRUPTIONS[name].least
    for severity in (1, 5):
        result = corrupt(ball(least), name, severity)
        assert result.shape[1] == CORRUPTIONS[name].size(least, severity)
