"""Sampling of triangle meshes."""

from __future__ import annotations

import numpy as np

from ifdefense.geometry.mesh import Doubles, Floats, Ints, Mesh


def sample_surface(mesh: Mesh, count: int, *, generator: np.random.Generator) -> tuple[Floats, Ints]:
    """Samples points independently and uniformly by area.

    A face is chosen by its area, then a point in it by uniform barycentric coordinates (Osada et al., 2002).

    Args:
        mesh: the surface.
        count: points to draw.
        generator: source of randomness.

    Returns:
        (count, 3) float32 points in the mesh's frame, and (count,) int64 indices of their faces.

    Raises:
        ValueError: the mesh has no faces or no area.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> samples, faces = sample_surface(mesh, 10, generator=np.random.default_rng(0))
        >>> samples.shape
        (10, 3)
    """
    face, weights = sample_faces(mesh, count, generator=generator)
    _, u, v = weights.T
    a, b, c = mesh.vertices.astype(np.float64)[mesh.faces[face]].transpose(1, 0, 2)
    points = a + u[:, None] * (b - a) + v[:, None] * (c - a)
    return points.astype(np.float32), face


def sample_faces(mesh: Mesh, count: int, *, generator: np.random.Generator) -> tuple[Ints, Doubles]:
    """As `sample_surface`, but returns faces (count,) and barycentric coordinates (count, 3) float64.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> faces, weights = sample_faces(mesh, 10, generator=np.random.default_rng(0))
        >>> np.allclose(weights.sum(1), 1)
        True
    """
    if mesh.is_empty:
        raise ValueError("the mesh is empty: there is no surface to sample")
    edges = np.cumsum(mesh.face_areas())
    if not edges[-1] > 0:
        raise ValueError(f"the mesh has no area: all of its {len(mesh.faces)} faces are degenerate")
    # `right` skips degenerate faces; rounding up is clipped to the last face that has an area.
    face = np.searchsorted(edges, generator.random(count) * edges[-1], side="right")
    face = np.minimum(face, np.searchsorted(edges, edges[-1], side="left"))
    u, v = generator.random((2, count))
    outside = u + v > 1  # reflect into the triangle
    u[outside], v[outside] = 1 - u[outside], 1 - v[outside]
    return face, np.stack([1 - u - v, u, v], axis=1)
