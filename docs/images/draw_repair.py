"""Draws repair.png beside it: planted anomalies, the surface with the marked part, and its repair."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from mpl_toolkits.mplot3d.axes3d import Axes3D
from numpy.typing import NDArray
from PIL import Image

import ifdefense
from ifdefense.corruptions.planted import plant
from ifdefense.geometry.mesh import Mesh
from ifdefense.shapes.procedural import make_shape

CASES = (("chair", "blob", 0.15), ("table", "spike", 0.2), ("bookshelf", "bridge", 0.2))
POINTS, PLANTED, SEED = 1024, 110, 0
LIGHT = np.array([0.4, -0.5, 0.77])


def draw(axes: Axes3D, mesh: Mesh, marked: NDArray[np.bool_] | None) -> None:
    """Draws a mesh, marked vertices red."""
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    shade = 0.45 + 0.5 * np.clip(normals @ LIGHT, 0, 1)
    colours = np.repeat(shade[:, None], 3, 1)
    if marked is not None:
        colours[marked[mesh.faces].any(1), 1:] *= 0.2
    axes.add_collection3d(Poly3DCollection(corners, facecolors=colours, edgecolors="none"))


def attacked(name: str, kind: str, size: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Samples of the first solid that has a place for the anomaly, and the points of the anomaly."""
    for seed in itertools.count(SEED):
        rng = np.random.default_rng(seed)
        dense = make_shape(name, rng).sample_surface(16 * POINTS, rng)[0]
        planted = plant(dense, kind, size, PLANTED, rng)
        if planted is not None:
            break
    return dense, planted


def main() -> None:
    """Draws one row per case."""
    purifier = ifdefense.load("local-mesh")
    figure = plt.figure(figsize=(9, 3 * len(CASES)), dpi=80)
    for row, (name, kind, size) in enumerate(CASES):
        dense, planted = attacked(name, kind, size)
        trace = purifier.trace(np.concatenate([dense[:POINTS], planted]), POINTS, SEED)[0]
        assert trace.mesh is not None and trace.repaired is not None
        for column, title in enumerate(("points, attacked", "surface, marked", "surface, repaired")):
            axes = figure.add_subplot(len(CASES), 3, 3 * row + column + 1, projection="3d")
            if column == 0:
                axes.scatter(*dense[:POINTS].T, s=2, c="gray")
                axes.scatter(*planted.T, s=3, c="red")
            else:
                draw(axes, *((trace.mesh, trace.mask) if column == 1 else (trace.repaired, None)))
            axes.set(xlim=(-0.4, 0.4), ylim=(-0.4, 0.4), zlim=(-0.4, 0.4), box_aspect=(1, 1, 1))
            axes.view_init(20, -60)
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title)
    figure.subplots_adjust(0, 0.01, 1, 0.95, 0, 0)
    target = Path(__file__).with_name("repair.png")
    figure.savefig(target)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(target, optimize=True)


if __name__ == "__main__":
    main()
