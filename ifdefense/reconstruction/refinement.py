"""Refinement of meshes by the first and second derivatives of the field.

Mescheder et al., 2019, https://arxiv.org/abs/1812.03828, section 3.3: random points of the faces are pulled
onto the level set, and the normals of the faces to the gradient of the field there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import Calibration, Field
from ifdefense.reconstruction.simplification import Simplification
from ifdefense.stages.extraction import Extraction


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Refinement stage: moves the vertices of a mesh by RMSprop; the faces stay.

    Attributes:
        steps: steps.
        rate: learning rate, about the length of a step in the unit cube.
        normals: weight of the normals.
        seed: seed of the points of the faces.

    Raises:
        ValueError: if a value is out of range.
    """

    steps: int = 30
    rate: float = 1e-4
    normals: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < 1 or not 0 <= self.normals < math.inf:
            raise ValueError(f"steps, rate or normals out of range: {self}")

    def __call__(self, mesh: Mesh, field: Field, cloud: Tensor, calibration: Calibration) -> Mesh:
        """Refines the mesh of one cloud.

        Args:
            mesh: extracted surface, unit cube.
            field: logits, twice differentiable in the points.
            cloud: ``()`` int64 index of the mesh's cloud in the field, on the field's device.
            calibration: thresholds; the one that the mesh is nearer to is taken.
        """
        if mesh.is_empty:
            return mesh
        vertices = torch.from_numpy(mesh.vertices.copy()).float().to(cloud.device)
        faces = torch.from_numpy(mesh.faces.copy()).to(cloud.device)
        owner = cloud.expand(len(faces))
        with torch.no_grad():
            threshold = _threshold(field(vertices, cloud.expand(len(vertices))), calibration)
        # Dirichlet(0.5): squares of three normal numbers, scaled to the sum 1.
        generator = torch.Generator().manual_seed(self.seed)
        with torch.enable_grad():
            vertices.requires_grad_()
            optimiser = torch.optim.RMSprop([vertices], lr=self.rate)
            for _ in range(self.steps):
                weights = (
                    torch.randn(len(faces), 3, generator=generator, dtype=torch.float32).square().to(vertices)
                )
                weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
                loss = refinement_loss(vertices, faces, weights, field, owner, threshold, self.normals)
                (vertices.grad,) = torch.autograd.grad(loss, vertices)
                optimiser.step()
        return Mesh(vertices.detach().cpu().numpy(), mesh.faces)


def refinement_loss(
    vertices: Tensor,
    faces: Tensor,
    weights: Tensor,
    field: Field,
    owner: Tensor,
    threshold: float,
    normals: float,
) -> Tensor:
    """``(f - τ)² + normals · |n - n(f)|²``, mean over the faces; differentiable in the vertices.

    ``f`` is the occupancy at a point of the face, ``n`` the face's normal, and ``n(f)`` the direction in
    which the occupancy falls, so that the gradient takes the field's second derivatives.

    Args:
        vertices: ``(V, 3)``, unit cube.
        faces: ``(F, 3)`` indices.
        weights: ``(F, 3)`` barycentric coordinates of the points.
        field: logits.
        owner: ``(F,)`` cloud of each face in the field, ascending.
        threshold: occupancy τ of the surface.
        normals: weight of the normals.
    """
    corners = vertices[faces]  # (F, 3, 3)
    points = (corners * weights.unsqueeze(-1)).sum(1)
    occupancy = field(points, owner).sigmoid()
    loss = (occupancy - threshold).square().mean()
    if not normals:
        return loss
    (slope,) = torch.autograd.grad(occupancy.sum(), points, create_graph=True)
    a, b, c = corners.unbind(1)
    normal = F.normalize(torch.linalg.cross(b - a, c - a), dim=1)
    apart = normal + F.normalize(slope, dim=1)
    return loss + normals * apart.square().sum(1).mean()


def _threshold(logits: Tensor, calibration: Calibration) -> float:
    """The threshold whose level is nearer to the logits at the vertices."""
    middle = float(logits.median())
    thresholds = [calibration.threshold, calibration.second_threshold or calibration.threshold]
    return min(thresholds, key=lambda value: abs(math.log(value / (1 - value)) - middle))


@dataclasses.dataclass(frozen=True)
class RefinedExtraction:
    """Extraction stage that simplifies and refines what another one extracts.

    Attributes:
        extract: field to mesh, as in `ifdefense.restorers.mesh.MeshRestorer`.
        simplify: ``None`` keeps all faces.
        refine: ``None`` keeps the vertices.
    """

    extract: Callable[[Field, Sequence[Tensor], Calibration], list[Mesh]] = Extraction()
    simplify: Callable[[Mesh], Mesh] | None = Simplification()
    refine: Refinement | None = Refinement()

    def __call__(self, field: Field, clouds: Sequence[Tensor], calibration: Calibration) -> list[Mesh]:
        """One mesh per cloud, see `ifdefense.stages.extraction.Extraction`; each for itself."""
        meshes = self.extract(field, clouds, calibration)
        if self.simplify is not None:
            meshes = [self.simplify(mesh) for mesh in meshes]
        if self.refine is not None:
            index = torch.arange(len(clouds), device=clouds[0].device)
            meshes = [
                self.refine(mesh, field, row, calibration)
                for mesh, row in zip(meshes, index.unbind(), strict=True)
            ]
        return meshes
