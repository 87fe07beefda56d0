"""Support for ``PointCloud`` and ``Trimesh`` of trimesh in `ifdefense.purify`.

A ``PointCloud`` comes back with its colours, weights and metadata: kept points keep their colours, new ones
take those of the nearest input point.

A ``Trimesh`` is sampled uniformly by area and becomes a ``PointCloud``, whose colours are those of the
vertices, faces or texture at the samples. Its ``vertex_attributes`` become an attribute of the same name of
the result: floating-point numbers are interpolated, others are those of the nearest corner.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ifdefense.arguments import cloud_of
from ifdefense.structures.registry import Build, Rows, Sampling
from ifdefense.structures.surface import SurfaceSamples


@dataclasses.dataclass(frozen=True, eq=False)
class _Points:
    """A cloud with its attributes.

    Attributes:
        positions: ``(N, 3)`` float64.
        attributes: ``(N, ...)`` by the names of ``PointCloud``'s own attributes.
        further: ``(N, ...)`` by name, for ``vertex_attributes``.
        metadata: of the whole cloud.
    """

    positions: Tensor
    attributes: Mapping[str, NDArray[Any]]
    further: Mapping[str, NDArray[Any]]
    metadata: Mapping[str, Any]

    @classmethod
    def of_cloud(cls, cloud: Any) -> _Points:
        own = {"weights": cloud.copy().weights}  # of a copy, as reading them may add them
        if np.shape(cloud.colors) == (len(cloud.vertices), 4):
            own["colors"] = np.asarray(cloud.colors)
        further = getattr(cloud, "vertex_attributes", {})
        return cls(_tensor(cloud.vertices), own, further, cloud.metadata)

    @classmethod
    def of_mesh(cls, mesh: Any, name: str, sampling: Sampling) -> _Points:
        vertices = _tensor(mesh.vertices)
        faces = _tensor(mesh.faces)
        samples = SurfaceSamples.of(vertices, faces, name, sampling)
        colours = _colours(mesh.visual, samples)
        return cls(
            samples.interpolated(vertices),
            {} if colours is None else {"colors": colours},
            {key: _at(samples, np.asarray(values)) for key, values in mesh.vertex_attributes.items()},
            mesh.metadata,
        )


def unpack(value: Any, name: str | None, sampling: Callable[[], Sampling]) -> tuple[list[Tensor], Build]:
    """See `ifdefense.structures.registry.Adapter`."""
    import trimesh

    called = name or "the cloud"
    points = _points(value, called, sampling)
    kind = type(value) if isinstance(value, trimesh.PointCloud) else trimesh.PointCloud
    cloud = cloud_of(points.positions, called)

    def build(results: Sequence[Tensor], rows: Rows) -> Any:
        index = rows(0).cpu().numpy()
        result = kind(results[0].detach().cpu().numpy(), metadata=copy.deepcopy(dict(points.metadata)))
        for key, values in points.attributes.items():
            setattr(result, key, values[index])
        if points.further:
            result.vertex_attributes = {key: np.asarray(each)[index] for key, each in points.further.items()}
        return result

    return [cloud], build


def inputs(value: Any, prepared: Callable[[Tensor], Tensor]) -> Tensor:
    """Positions ``(N, 3)``."""
    return prepared(_points(value, "the cloud", Sampling).positions)


def _points(value: Any, name: str, sampling: Callable[[], Sampling]) -> _Points:
    import trimesh

    if isinstance(value, trimesh.PointCloud):
        return _Points.of_cloud(value)
    if isinstance(value, trimesh.Trimesh):
        return _Points.of_mesh(value, name, sampling())
    raise TypeError(
        f"{name} is a {type(value).__name__}: expected a PointCloud or a Trimesh, such as scene.to_mesh()"
    )


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(values))


def _colours(visual: Any, samples: SurfaceSamples) -> NDArray[Any] | None:
    """RGBA ``(N, 4)`` of samples; ``None`` without colours."""
    if visual.kind == "texture":
        visual = visual.to_color()
    if visual.kind == "face":
        colours: NDArray[Any] = np.asarray(visual.face_colors)[samples.face.numpy()]
        return colours
    return _at(samples, np.asarray(visual.vertex_colors), rounded=True) if visual.kind == "vertex" else None


def _at(samples: SurfaceSamples, values: NDArray[Any], *, rounded: bool = False) -> NDArray[Any]:
    """Values ``(V, ...)`` of vertices at the samples, in the same dtype."""
    if values.dtype.kind != "f" and not rounded:
        nearest: NDArray[Any] = values[samples.nearest.numpy()]
        return nearest
    flat = _tensor(values.reshape(len(values), -1).astype(np.float64))
    found = samples.interpolated(flat).numpy().reshape(-1, *values.shape[1:])
    return (found.round() if rounded else found).astype(values.dtype)
