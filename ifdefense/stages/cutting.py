"""Cuts regions out of a mesh, closes the holes, and fairs the patches.

Patches minimise the bi-Laplacian energy with fixed surroundings (Botsch and Kobbelt, 2004,
https://doi.org/10.1145/1015706.1015772). A watertight mesh stays watertight.
"""

from __future__ import annotations

import numpy as np

from ifdefense.geometry.mesh import Doubles, Ints, Mesh, norms
from ifdefense.geometry.mesh_graph import Mask, adjacency, dilated


def rebuilt(mesh: Mesh, regions: Ints, free: Mask, floating: Mask) -> Mesh:
    """Removes floating components; cuts out each region, closes its holes and fairs the patches.

    Args:
        mesh: the surface, not modified.
        regions: (V,) number of the region of each vertex, -1 for none.
        free: (V,) vertices that are faired: the regions and their surroundings.
        floating: (V,) vertices of components that are removed.
    """
    vertices, faces = mesh.vertices.astype(np.float64), mesh.faces[~floating[mesh.faces[:, 0]]]
    if free.any():
        step = float(np.median(norms(vertices[faces[:, 0]] - vertices[faces[:, 1]])))
        vertices, faces = _cut_off(vertices, faces, regions, step)
        free = np.append(free, np.ones(len(vertices) - len(free), bool))
        vertices = _faired(vertices, faces, free)
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    return Mesh(vertices[used].astype(np.float32), (np.cumsum(used) - 1)[faces])


def _cut_off(vertices: Doubles, faces: Ints, regions: Ints, step: float) -> tuple[Doubles, Ints]:
    """Replaces the faces inside each region by caps on its boundary loops."""
    label = regions[faces]
    within = np.where((label == label[:, :1]).all(axis=1), label[:, 0], -1)  # (F,) region of each face
    for region in range(int(regions.max()) + 1):
        loops = boundary_loops(faces[within == region])
        faces, within = faces[within != region], within[within != region]
        for loop in loops:
            added, cap = _cap(vertices[loop], loop, len(vertices), step)
            vertices, faces = np.concatenate([vertices, added]), np.concatenate([faces, cap])
            within = np.append(within, np.full(len(cap), -1))
    return vertices, faces


def _cap(corners: Doubles, loop: Ints, first: int, step: float) -> tuple[Doubles, Ints]:
    """Closes a loop by rings about ``step`` apart; new vertices are numbered from ``first``."""
    size, centre = len(loop), corners.mean(axis=0)
    rings = max(1, round(float(norms(corners - centre).mean()) / step))
    shares = np.arange(1, rings)[:, None, None] / rings
    added = np.concatenate([(corners + shares * (centre - corners)).reshape(-1, 3), centre[None]])
    rows = np.concatenate([loop, first + np.arange((rings - 1) * size)]).reshape(rings, size)
    turned = np.roll(rows, -1, axis=1)
    last = np.full(size, first + len(added) - 1)
    quads = [rows[:-1], turned[:-1], turned[1:], rows[:-1], turned[1:], rows[1:]]
    sides = np.stack([part.ravel() for part in quads], axis=1).reshape(-1, 3)
    return added, np.concatenate([sides, np.stack([rows[-1], turned[-1], last], axis=1)])


def boundary_loops(faces: Ints) -> list[Ints]:
    """Simple closed loops of boundary edges, oriented as their faces."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    base = int(faces.max(initial=0)) + 1
    lone = ~np.isin(edges[:, 0] * base + edges[:, 1], edges[:, 1] * base + edges[:, 0])
    following: dict[int, list[int]] = {}
    for start, stop in edges[lone].tolist():
        following.setdefault(start, []).append(stop)
    loops: list[Ints] = []
    while following:
        path = [next(iter(following))]
        while path:
            stops = following.get(path[-1])
            if not stops:
                break
            stop = stops.pop()
            if not stops:
                del following[path[-1]]
            if stop in path:  # closes a loop; the path before it remains open
                first = path.index(stop)
                loops.append(np.array(path[first:]))
                del path[first + 1 :]
            else:
                path.append(stop)
    return loops


def _faired(vertices: Doubles, faces: Ints, free: Mask) -> Doubles:
    """Moves the free vertices to the minimum of the bi-Laplacian energy, with the others fixed."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import splu

    graph = adjacency(faces, len(vertices))
    degrees = graph.sum(axis=1)
    # Components without fixed vertices have no unique minimum: cut-off parts, or parts within the rim.
    component = connected_components(graph, directed=False)[1]
    free = free & (np.bincount(component, ~free) > 0)[component]
    rows = np.flatnonzero(dilated(graph, free, 1))
    neighbours = graph[rows]
    neighbours.data = neighbours.data / np.repeat(degrees[rows], np.diff(neighbours.indptr))
    selection = csr_array((np.ones(len(rows)), (np.arange(len(rows)), rows)), shape=neighbours.shape)
    laplacian = (selection - neighbours).tocsc()  # uniform weights, robust to the slivers of marching cubes
    moving = laplacian[:, np.flatnonzero(free)]
    constant = laplacian @ np.where(free[:, None], 0.0, vertices)
    solver = splu((moving.T @ moving).tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    result = vertices.copy()
    result[free] = solver.solve(-(moving.T @ constant))
    return result
