"""The measure of reconstruction: its floor, its unit, and what a perfect or a shifted answer gets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.studies.reconstruction import chamfer_l1, figures, inputs, table, unit
from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.sampling import sample_surface


def square(side: float) -> Mesh:
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32) * side
    return Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]]))


def test_unit_meshes_have_side_one() -> None:
    vertices = unit(square(5.0)).vertices
    np.testing.assert_allclose(np.ptp(vertices, axis=0), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(vertices.min(0) + vertices.max(0), 0, atol=1e-6)


def test_a_perfect_answer_is_at_the_floor_and_a_shifted_one_at_its_shift() -> None:
    mesh = unit(square(2.0))

    def sampled(cloud: np.ndarray) -> Tensor:
        return torch.from_numpy(sample_surface(mesh, 2000, generator=np.random.default_rng(9))[0])

    perfect = figures([mesh, mesh], 2000, sampled, 0)
    assert perfect["clean"] == pytest.approx(perfect["floor"], rel=0.05) and perfect["missing"] == 0
    shifted = figures([mesh], 2000, lambda cloud: sampled(cloud) + torch.tensor([0.0, 0, 0.2]), 0)
    assert shifted["clean"] == pytest.approx(2.0, rel=0.01)  # tenths of the longest side
    missing = figures([mesh], 100, lambda cloud: None if len(cloud) == 1024 else sampled(cloud), 0)
    assert missing["missing"] >= 0.5


def test_chamfer_is_half_the_sum_of_both_directions() -> None:
    a, b = torch.tensor([[0.0, 0, 0]]), torch.tensor([[1.0, 0, 0], [3.0, 0, 0]])
    assert chamfer_l1(a, b) == pytest.approx((1 + 2) / 2)


def test_inputs_are_drawn_from_the_mesh_and_corrupted() -> None:
    given = inputs(unit(square(1.0)), np.random.default_rng(0))
    assert given["clean"].shape == (1024, 3) and np.abs(given["clean"][:, 2]).max() < 1e-6
    again = inputs(unit(square(1.0)), np.random.default_rng(0))
    np.testing.assert_array_equal(given["corrupted"], again["corrupted"])
    assert not np.array_equal(given["corrupted"][:1024], given["clean"])


def test_table() -> None:
    row = {"floor": 0.08, "clean": 0.12, "corrupted": 0.15}
    text = table({"rows": {"x": row}, "names": ["a"], "samples": 4096, "date": "2026-01-01"})
    assert "| x | 0.080 | 0.120 | 0.150 |" in text
