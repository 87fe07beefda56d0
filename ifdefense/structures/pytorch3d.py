"""Support for ``Pointclouds`` and ``Meshes`` of PyTorch3D in `ifdefense.purify`.

``Pointclouds`` are purified cloud by cloud. Kept points keep their features and normals; new ones take those
of the nearest input point.

``Meshes`` are sampled uniformly by area and become ``Pointclouds`` with the normals of the sampled faces, and
with features if their textures are features of vertices (``TexturesVertex``); other textures are dropped.
Gradients pass to the vertices.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ifdefense.arguments import cloud_of
from ifdefense.structures.registry import Build, Rows, Sampling, names_of
from ifdefense.structures.surface import SurfaceSamples


def unpack(value: Any, name: str | None, sampling: Callable[[], Sampling]) -> tuple[list[Tensor], Build]:
    """See `ifdefense.structures.registry.Adapter`."""
    names = names_of(len(value), name)
    if not names:
        raise ValueError(f"{name or 'the batch'} has no clouds")
    clouds = _sampled(value, names, sampling()) if isinstance(value, _classes().Meshes) else value
    parts = [cloud_of(part, called) for part, called in zip(clouds.points_list(), names, strict=True)]

    def build(results: Sequence[Tensor], rows: Rows) -> Any:
        attributes = {"normals": clouds.normals_list(), "features": clouds.features_list()}
        device = clouds.device
        indices = [rows(i).to(device) for i in range(len(parts))] if any(attributes.values()) else []
        return type(clouds)(
            points=[result.to(device) for result in results],
            **{
                key: values and [each[index] for each, index in zip(values, indices, strict=True)]
                for key, values in attributes.items()
            },
        )

    return parts, build


def inputs(value: Any, prepared: Callable[[Tensor], Tensor]) -> Tensor | list[Tensor]:
    """Positions ``(B, N, 3)``, or a list if the clouds differ in size."""
    if isinstance(value, _classes().Meshes):
        value = _sampled(value, names_of(len(value), None), Sampling())
    clouds = value.points_list()
    if len({len(cloud) for cloud in clouds}) == 1:
        return prepared(torch.stack(clouds))
    return [prepared(cloud) for cloud in clouds]


def _classes() -> ModuleType:
    return importlib.import_module("pytorch3d.structures")


def _sampled(meshes: Any, names: Sequence[str], sampling: Sampling) -> Any:
    """``Pointclouds`` of samples of each mesh."""
    vertices, faces = meshes.verts_list(), meshes.faces_list()
    samples = [SurfaceSamples.of(*each, sampling) for each in zip(vertices, faces, names, strict=True)]
    features = getattr(meshes.textures, "verts_features_list", lambda: None)()
    return _classes().Pointclouds(
        points=[each.interpolated(part) for each, part in zip(samples, vertices, strict=True)],
        normals=[each.normals(part) for each, part in zip(samples, vertices, strict=True)],
        features=features and [each.interpolated(part) for each, part in zip(samples, features, strict=True)],
    )
