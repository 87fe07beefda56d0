"""Up axes, and exact rotations between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the command line needs the axes without heavy imports
    from ifdefense.geometry.mesh import Mesh

UP = "z"
"""The up axis of the library: of its weights, its classifiers and its labelled sets."""

_TO_Z = {
    "z": ("x", "y", "z"),
    "y": ("x", "-z", "y"),
    "x": ("-z", "y", "x"),
    "-z": ("x", "-y", "-z"),
    "-y": ("x", "z", "-y"),
    "-x": ("z", "y", "-x"),
}
"""New x, y and z for each up axis: half and quarter turns about x, or about y for up axis x."""

AXES = tuple(_TO_Z)
"""Names of the up axes."""

P = TypeVar("P", bound=Any)


def axis_of(value: object, name: str = "up") -> str:
    """Checks the name of an up axis.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is not one of `AXES`.

    Examples:
        >>> axis_of("y")
        'y'
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    if value not in AXES:
        raise ValueError(f"{name} must be one of {', '.join(AXES)}, got {value!r}")
    return value


def trained_axis(network: object) -> str | None:
    """Up axis of a network by its attribute ``up_axis``; ``None`` if it has none.

    Examples:
        >>> trained_axis(classifiers.load("pointnet-modelnet40"))
        'z'
    """
    value = getattr(network, "up_axis", None)
    return None if value is None else axis_of(value, "up_axis")


def turned(points: P, up: str, to: str = UP) -> P:
    """Rotates points from one up axis to another.

    Columns are permuted and signs changed, so the rotation and its inverse are exact. y up becomes z up by a
    quarter turn about x, ``(x, y, z) → (x, -z, y)``.

    Args:
        points: ``(..., 3)`` array or tensor; differentiable.
        up: their up axis, one of `AXES`.
        to: the new one.

    Returns:
        New points, or the same object if the axes are equal.

    Raises:
        ValueError: if an axis is unknown.

    Examples:
        >>> turned(np.array([[1.0, 2.0, 3.0]]), "y")
        array([[ 1., -3.,  2.]])
    """
    columns = _composed(axis_of(up), axis_of(to, "to"))
    if columns == ("x", "y", "z"):
        return points
    import numpy as np
    import torch

    parts = [points[..., "xyz".index(name[-1])] for name in columns]
    parts = [-part if name[0] == "-" else part for name, part in zip(columns, parts, strict=True)]
    result: Any = torch.stack(parts, -1) if isinstance(points, torch.Tensor) else np.stack(parts, -1)
    return result  # type: ignore[no-any-return]


def turned_mesh(mesh: Mesh, up: str, to: str = UP) -> Mesh:
    """`turned` for the vertices of a mesh.

    Examples:
        >>> mesh = ifdefense.Mesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
        >>> turned_mesh(mesh, "y").vertices[2].tolist()
        [0.0, -0.0, 1.0]
    """
    from ifdefense.geometry.mesh import Mesh

    return mesh if up == to else Mesh(turned(mesh.vertices, up, to), mesh.faces)


def _composed(up: str, to: str) -> tuple[str, ...]:
    """New x, y and z in terms of the old ones."""
    forward, backward = _TO_Z[up], _TO_Z[to]
    result = [""] * 3
    for new, old in zip(forward, backward, strict=True):  # both equal the same coordinate of the z-up points
        sign = "-" if (new[0] == "-") != (old[0] == "-") else ""
        result["xyz".index(old[-1])] = sign + new[-1]
    return tuple(result)
