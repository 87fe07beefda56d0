"""The part of PyTorch3D's structures that purification uses, with the names and rules of the real classes.

PyPI has no build of PyTorch3D for current versions of torch. Tests use the real classes where installed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

Parts = Sequence[Tensor] | Tensor


def _listed(values: Parts | None, sizes: Sequence[int] | None = None) -> list[Tensor] | None:
    if values is None:
        return None
    parts = list(values)
    if sizes is not None and [len(part) for part in parts] != list(sizes):
        raise ValueError("A cloud has mismatched numbers of points and inputs")
    return parts


class Pointclouds:
    def __init__(self, points: Parts, normals: Parts | None = None, features: Parts | None = None) -> None:
        if not isinstance(points, (list, Tensor)):
            raise ValueError("Points must be either a list or a tensor with shape (batch_size, P, 3)")
        self._points = _listed(points) or []
        sizes = [len(part) for part in self._points]
        self._normals, self._features = _listed(normals, sizes), _listed(features, sizes)
        self.device = self._points[0].device if self._points else torch.device("cpu")

    def __len__(self) -> int:
        return len(self._points)

    def points_list(self) -> list[Tensor]:
        return self._points

    def normals_list(self) -> list[Tensor] | None:
        return self._normals

    def features_list(self) -> list[Tensor] | None:
        return self._features

    def points_padded(self) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(self._points, batch_first=True)


class TexturesVertex:
    def __init__(self, verts_features: Parts) -> None:
        self._features = _listed(verts_features)

    def verts_features_list(self) -> list[Tensor] | None:
        return self._features


class Meshes:
    def __init__(self, verts: Parts, faces: Parts, textures: TexturesVertex | None = None) -> None:
        self._verts, self._faces = _listed(verts) or [], _listed(faces) or []
        self.textures = textures
        self.device = self._verts[0].device if self._verts else torch.device("cpu")

    def __len__(self) -> int:
        return len(self._verts)

    def verts_list(self) -> list[Tensor]:
        return self._verts

    def faces_list(self) -> list[Tensor]:
        return self._faces


@contextlib.contextmanager
def pytorch3d_structures() -> Iterator[ModuleType]:
    """``pytorch3d.structures``: the real module if it is installed, else the stand-in under its name."""
    with contextlib.suppress(ImportError):
        yield importlib.import_module("pytorch3d.structures")
        return
    module = ModuleType("pytorch3d.structures")
    module.Pointclouds, module.Meshes = Pointclouds, Meshes
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pytorch3d", ModuleType("pytorch3d"))
        patch.setitem(sys.modules, "pytorch3d.structures", module)
        yield module
