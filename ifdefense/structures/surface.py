"""Sampling of the meshes of other libraries, with the attributes of their vertices."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.sampling import sample_faces
from ifdefense.structures.registry import Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class SurfaceSamples:
    """Points on the surface of a mesh, as faces and barycentric coordinates.

    Attributes:
        face: ``(N,)`` face of each point.
        corners: ``(N, 3)`` vertices of that face.
        weights: ``(N, 3)`` float64 barycentric coordinates.
    """

    face: Tensor
    corners: Tensor
    weights: Tensor

    @classmethod
    def of(cls, vertices: Tensor, faces: Tensor, name: str, sampling: Sampling) -> Self:
        """Samples a mesh.

        Args:
            vertices: ``(V, 3)``.
            faces: ``(F, 3)`` indices of vertices.
            name: name of the mesh, for error messages.
            sampling: number of points, and the seed.

        Raises:
            ValueError: if the mesh is invalid or has no area.
        """
        try:
            mesh = Mesh(vertices.detach().cpu().double().numpy(), faces.detach().cpu().numpy())
            generator = np.random.default_rng(sampling.seed)
            face, weights = sample_faces(mesh, sampling.count, generator=generator)
        except ValueError as error:
            raise ValueError(f"{name} cannot be sampled: {error}") from None
        index = torch.from_numpy(face).to(faces.device)
        return cls(index, faces[index].long(), torch.from_numpy(weights).to(vertices.device))

    def interpolated(self, values: Tensor) -> Tensor:
        """Values ``(N, D)`` at the points, from those of the vertices ``(V, D)``; differentiable."""
        weights = self.weights.to(values.dtype)
        return torch.einsum("nc,ncd->nd", weights, values[self.corners])

    @property
    def nearest(self) -> Tensor:
        """``(N,)`` the corner with the largest weight, for values that cannot be interpolated."""
        return self.corners.gather(1, self.weights.argmax(1, keepdim=True)).squeeze(1)

    def normals(self, vertices: Tensor) -> Tensor:
        """``(N, 3)`` unit normals of the faces; differentiable."""
        a, b, c = vertices[self.corners].unbind(1)
        return torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=1)
