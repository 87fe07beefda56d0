"""Fixtures: clouds on analytic solids, an accelerator or its stand-in, and the folder of ModelNet40."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_device
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

Points = NDArray[np.float32]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default=fake_device.NAME,
        help="Where tests of devices compute, such as cuda. The default is a stand-in for an accelerator.",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs tests of devices first: autograd's threads are those for the devices known at its first pass."""
    items.sort(key=lambda item: "device" not in getattr(item, "fixturenames", ()))


def sample_box(sides: tuple[float, float, float], count: int, rng: np.random.Generator) -> Points:
    """Samples the surface of a box that is centred on the origin, every face by its area."""
    half = np.asarray(sides) / 2
    area = np.array([half[1] * half[2], half[0] * half[2], half[0] * half[1]]).repeat(2)
    face = rng.choice(6, size=count, p=area / area.sum())
    points = rng.uniform(-half, half, size=(count, 3))
    axis, sign = face // 2, 2 * (face % 2) - 1
    points[np.arange(count), axis] = sign * half[axis]
    return points.astype(np.float32)


@pytest.fixture
def sphere_cloud() -> Points:
    """1,024 points on the sphere of radius 0.5."""
    points = np.random.default_rng(0).normal(size=(1024, 3))
    return (0.5 * points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def box_cloud() -> Points:
    """1,024 points on a box of 1 x 0.6 x 0.4."""
    return sample_box((1.0, 0.6, 0.4), 1024, np.random.default_rng(1))


@pytest.fixture
def table_cloud() -> Points:
    """1,024 points on a table: a top of 1 x 0.7 on four legs, z up, 0.7 high."""
    rng = np.random.default_rng(2)
    top = sample_box((1.0, 0.7, 0.06), 624, rng) + np.float32([0, 0, 0.32])
    leg = [
        sample_box((0.06, 0.06, 0.64), 100, rng) + np.float32([x, y, -0.03])
        for x in (-0.45, 0.45)
        for y in (-0.3, 0.3)
    ]
    return np.concatenate([top, *leg]).astype(np.float32)


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of ``--device``, with its index."""
    name = request.config.getoption("--device")
    if name != fake_device.NAME:
        yield torch.empty(0, device=name).device
        return
    try:
        fake_device.register()
    except ImportError as error:
        pytest.skip(f"this PyTorch takes no stand-in for an accelerator: {error}")
    with fake_device.present() as stand_in, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_device, "available", True)
        yield stand_in


@pytest.fixture
def stand_in(device: torch.device) -> torch.device:
    """The stand-in, for tests that count launches or take float64 away."""
    if device.type != fake_device.NAME:
        pytest.skip("only the stand-in counts launches and lacks what it is told to")
    return device


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds ``modelnet40``; the test skips where there is none."""
    root = os.environ.get("IFDEFENSE_DATA")
    if not root:
        pytest.skip("IFDEFENSE_DATA is not set: this test reads ModelNet40")
    if not (Path(root) / "modelnet40").is_dir():
        pytest.skip(f"{root} has no folder modelnet40")
    return Path(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if (
        not sys.platform.startswith("linux")
        or os.geteuid()
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
