"""Draws procedural.png beside it: three shapes of every class, by marching cubes of their distances."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from mpl_toolkits.mplot3d.axes3d import Axes3D
from PIL import Image
from skimage.measure import marching_cubes

from ifdefense.shapes.procedural import CLASSES, Shape, make_shapes

EACH, COLUMNS, CELLS, SIDE = 3, 12, 110, 1.06


def draw(axes: Axes3D, shape: Shape) -> None:
    """Draws the surface of a shape."""
    axis = np.linspace(-SIDE / 2, SIDE / 2, CELLS + 1, dtype=np.float32)
    field = shape.sdf(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1))
    vertices, faces, _, _ = marching_cubes(field, 0.0)
    x, y, z = (vertices / CELLS - 0.5).T * SIDE
    axes.plot_trisurf(x, y, z, triangles=faces[:, ::-1], color="#7aa6d8", linewidth=0, antialiased=False)
    axes.set(xlim=(-0.42, 0.42), ylim=(-0.42, 0.42), zlim=(-0.42, 0.42), box_aspect=(1, 1, 1))
    axes.view_init(22, -60)
    axes.set_axis_off()


def main() -> None:
    """Draws all classes, one after the other."""
    rows = -(-len(CLASSES) * EACH // COLUMNS)
    figure = plt.figure(figsize=(1.4 * COLUMNS, 1.45 * rows), dpi=100)
    for number, shape in enumerate(make_shapes(EACH)):
        axes = figure.add_subplot(rows, COLUMNS, number + 1, projection="3d")
        draw(axes, shape)
        if number % EACH == 1:
            axes.set_title(CLASSES[shape.label], fontsize=11, y=0.97)
    figure.subplots_adjust(0, 0.015, 1, 0.97, 0, 0.04)
    target = Path(__file__).with_name("procedural.png")
    figure.savefig(target)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(target, optimize=True)


if __name__ == "__main__":
    main()
