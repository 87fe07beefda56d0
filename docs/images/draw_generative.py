"""Draws generative.png beside it: shapes drawn from the prior, and interpolations between some of them.

The weights are those of the first argument, by default the shipped ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from mpl_toolkits.mplot3d.axes3d import Axes3D
from PIL import Image

from ifdefense.geometry.mesh import Mesh
from ifdefense.implicit.base import load_network
from ifdefense.reconstruction.generative import GenerativeOccupancyNetwork
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes

SAMPLED, PATHS, COLUMNS, SEED = 20, 2, 10, 0


def draw(axes: Axes3D, mesh: Mesh, colour: str) -> None:
    """Draws a mesh."""
    if not mesh.is_empty:
        x, y, z = mesh.vertices.T
        axes.plot_trisurf(x, y, z, triangles=mesh.faces, color=colour, linewidth=0, antialiased=False)
    axes.set(xlim=(-0.5, 0.5), ylim=(-0.5, 0.5), zlim=(-0.5, 0.5), box_aspect=(1, 1, 1))
    axes.view_init(22, -60)
    axes.set_axis_off()


@torch.no_grad()
def main() -> None:
    """Draws two rows of samples, then one row for each interpolation."""
    weights = sys.argv[1] if len(sys.argv) > 1 else "generative"
    model = cast(GenerativeOccupancyNetwork, load_network(weights))
    calibration = model.calibration
    options = ExtractionOptions(64, 32, calibration.threshold, calibration.box)
    meshes = extract_meshes(model.sample(SAMPLED, SEED), SAMPLED, options)
    ends = model.latents(2 * PATHS, SEED)
    for number in range(PATHS):
        path = model.interpolate(ends[2 * number], ends[2 * number + 1], COLUMNS)
        meshes += extract_meshes(path, COLUMNS, options)
    figure = plt.figure(figsize=(1.4 * COLUMNS, 1.4 * len(meshes) / COLUMNS), dpi=100)
    for number, mesh in enumerate(meshes):
        axes = figure.add_subplot(len(meshes) // COLUMNS, COLUMNS, number + 1, projection="3d")
        draw(axes, mesh, "#7aa6d8" if number < SAMPLED else "#d8a67a")
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    target = Path(__file__).with_name("generative.png")
    figure.savefig(target)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(target, optimize=True)


if __name__ == "__main__":
    main()
