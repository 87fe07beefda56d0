"""Reports of purifications: a self-contained interactive HTML page, and a PNG for print.

Each cloud has three views in one frame: the input, the reconstructed surface with coloured anomalies, and the
result, with the figures of each stage.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ifdefense.geometry.mesh import Mesh
from ifdefense.geometry.points import chamfer_distance
from ifdefense.purifiers.base import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = 65535
"""Number of quantisation steps of coordinates in the page, per longest side."""

REACH = 8.0
"""Distance, in radii of the view, beyond which points are not shown."""

INK = "#1d2329"
GREY = "#9aa3ab"
KEPT = "#2f5d8a"
DROPPED = "#e08a1e"
CLEAN = "#0f8074"
ANOMALY = "#d1344b"
SURFACE = "#d9dce0"


@dataclasses.dataclass(frozen=True)
class Reading:
    """Prediction of a classifier for a cloud.

    Attributes:
        label: name of the predicted class.
        correct: whether the prediction is correct.
    """

    label: str
    correct: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One cloud of a report.

    Attributes:
        title: name of the cloud or file.
        trace: intermediate results of each stage.
        clean: ``(N, 3)`` the cloud before the attack, in the same frame, if known.
        before: prediction of a classifier before purification.
        after: prediction after purification.
        added: ``(N,)`` which points of the input an attack has added, if known.
    """

    title: str
    trace: Trace
    clean: NDArray[np.floating] | None = None
    before: Reading | None = None
    after: Reading | None = None
    added: NDArray[np.bool_] | None = None

    def states(self) -> NDArray[np.uint8]:
        """``(N,)`` state of each input point: 0 kept, 1 dropped as an outlier, 2 added by the attack."""
        states = (~self.trace.kept_mask).astype(np.uint8)
        if self.added is not None:
            states[self.added] = 2
        return states


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a report; the first column holds the names of the rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The figures of one purification.

    Chamfer distances are not squared, and relative to the longest side of the kept points.

    Attributes:
        points: number of input points.
        dropped: number of points removed by the outlier filter.
        purified: number of points of the result.
        faces: number of triangles of the reconstructed surface.
        anomalies: number of connected regions removed from the surface.
        anomalous_area: their share of the surface area.
        moved: Chamfer distance between input and result.
        before: Chamfer distance from the input to the clean cloud, if known.
        after: Chamfer distance from the result to the clean cloud, if known.
        seconds: time of each stage.
        fallback: reason why no surface was sampled, else ``None``.
    """

    points: int
    dropped: int
    purified: int
    faces: int
    anomalies: int
    anomalous_area: float
    moved: float
    before: float | None
    after: float | None
    seconds: Mapping[str, float]
    fallback: str | None

    @classmethod
    def of(cls, trace: Trace, clean: NDArray[np.floating] | None = None) -> Numbers:
        """Computes the figures of a trace.

        Args:
            trace: of one cloud.
            clean: ``(N, 3)`` the cloud before the attack, in the same frame.
        """
        side = float(np.ptp(trace.kept.astype(np.float64), axis=0).max()) or 1.0
        anomalies, area = _anomalies(trace)
        return cls(
            points=len(trace.points),
            dropped=int((~trace.kept_mask).sum()),
            purified=len(trace.purified),
            faces=0 if trace.mesh is None else len(trace.mesh.faces),
            anomalies=anomalies,
            anomalous_area=area,
            moved=_chamfer(trace.points, trace.purified) / side,
            before=None if clean is None else _chamfer(trace.points, clean) / side,
            after=None if clean is None else _chamfer(trace.purified, clean) / side,
            seconds=dict(trace.seconds),
            fallback=trace.fallback,
        )


def _chamfer(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    one, other = (torch.tensor(points, dtype=torch.float64)[None] for points in (a, b))
    return float(chamfer_distance(one, other, squared=False))


def _anomalies(trace: Trace) -> tuple[int, float]:
    """Number of connected regions of the anomaly mask, and their share of the surface area."""
    if trace.mesh is None or trace.mask is None or not trace.mask.any():
        return 0, 0.0
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = trace.mesh.edges()
    inside = edges[trace.mask[edges].all(axis=1)]
    size = len(trace.mesh.vertices)
    graph = coo_array((np.ones(len(inside), bool), (inside[:, 0], inside[:, 1])), shape=(size, size))
    component = connected_components(graph, directed=False)[1]
    area = trace.mesh.face_areas()
    share = area[trace.mask[trace.mesh.faces].all(axis=1)].sum() / area.sum()
    return len(np.unique(component[trace.mask])), float(share)


def heat(trace: Trace) -> NDArray[np.float32]:
    """Strength of each vertex's colour, ``(V,)``: 1 where the surface was removed, else up to 0.5."""
    if trace.mesh is None or trace.score is None or trace.mask is None:
        return np.zeros(0 if trace.mesh is None else len(trace.mesh.vertices), np.float32)
    # Squared, so that only scores near 1, the threshold of anomalies, are visible.
    return np.where(trace.mask, 1.0, 0.5 * np.clip(trace.score, 0, 1) ** 2).astype(np.float32)


def render_html(
    cases: Sequence[Case],
    *,
    title: str,
    facts: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
    total: int | None = None,
) -> str:
    """Self-contained HTML page: needs no network and no other files.

    Views are rotated by mouse, touch or keyboard, as explained on the page.

    Args:
        cases: clouds to show, about half a megabyte each. Repeated titles are numbered.
        title: heading.
        facts: settings of the run, such as method, seed and device.
        tables: shown after the first cloud.
        total: total number of clouds, stated on the page if only some are shown.

    Raises:
        ValueError: if ``total`` is less than the number of cases, or a figure is not finite.
    """
    if total is not None and total < len(cases):
        raise ValueError(f"{len(cases)} clouds are shown, total cannot be {total}")
    content = {
        "title": title,
        "facts": list((facts or {}).items()),
        "tables": [dataclasses.asdict(table) for table in tables],
        "cases": [{"title": name, **_case(case)} for name, case in zip(_unique(cases), cases, strict=True)],
        "total": len(cases) if total is None else total,
    }
    return self_contained(_template("report.html"), content)


def self_contained(page: str, content: Mapping[str, Any]) -> str:
    """Fills a template of a page that needs no network and no other files.

    Args:
        page: HTML with ``{{style}}`` and ``{{views}}`` for the style and the 3D views that our pages share,
            one ``<script>``, ``{{policy}}`` for its content security policy, and ``{{data}}``.
        content: shown by the script.

    Raises:
        ValueError: if a figure is not finite.
    """
    page = page.replace("{{style}}", _template("base.css")).replace("{{views}}", _template("views.js"))
    # "<" is escaped, so that names cannot close the script element.
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return page.replace("{{policy}}", _policy(page)).replace("{{data}}", data)


def _template(name: str) -> str:
    return (resources.files("ifdefense") / "templates" / name).read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """Content security policy: only the page's own script and inline styles."""
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; base-uri 'none'; "
        "form-action 'none'"
    )


def _unique(cases: Sequence[Case]) -> list[str]:
    """Titles; repeated ones are numbered."""
    titles = [case.title for case in cases]
    result, taken = [], set(titles)
    for title in titles:
        name, number = title, 0
        if titles.count(title) > 1:
            while name in taken:
                number += 1
                name = f"{title} ({number})"
        taken.add(name)
        result.append(name)
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class ViewFrame:
    """The frame of a page's view; coordinates are stored as steps of ``span / LEVELS`` from ``low``.

    Attributes:
        centre: ``(3,)`` what the view turns about.
        radius: what it shows around the centre. Points more than `REACH` of it away are drawn in their
            direction, out of sight: storing them where they are would leave no precision for the others.
        low: ``(3,)`` lowest stored coordinates.
        span: length of the longest side of what is stored.
    """

    centre: NDArray[np.float64]
    radius: float
    low: NDArray[np.float64]
    span: float

    @classmethod
    def around(cls, centre: NDArray[np.float64], radius: float, points: NDArray[np.float64]) -> ViewFrame:
        """The frame of a view that stores the points ``(N, 3)``."""
        reach = REACH * radius
        low = np.maximum(points.min(axis=0), centre - reach)
        return cls(centre, radius, low, float((np.minimum(points.max(axis=0), centre + reach) - low).max()))

    def far(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """``(N,)`` which points are too far away to show."""
        return np.asarray(np.linalg.norm(points - self.centre, axis=1) > REACH * self.radius)

    def pack(self, points: NDArray[np.floating]) -> str:
        """Points ``(N, 3)`` as Base64 of 16-bit steps."""
        reach = REACH * self.radius
        offset = points.astype(np.float64) - self.centre
        distance = np.linalg.norm(offset, axis=1, keepdims=True)
        inside = self.centre + offset * np.minimum(1, reach / np.maximum(distance, reach))
        return _base64(np.rint((inside - self.low) / self.span * LEVELS).clip(0, LEVELS).astype("<u2"))

    def model(self) -> dict[str, Any]:
        """What the page needs to draw packed points: centre and radius in steps, and the length of a step."""
        steps = LEVELS / self.span
        return {
            "centre": ((self.centre - self.low) * steps).tolist(),
            "radius": self.radius * steps,
            "step": 1 / steps,
        }


def _case(case: Case) -> dict[str, Any]:
    trace = case.trace
    meshes = [mesh for mesh in (trace.mesh, trace.repaired) if mesh is not None]
    parts = [trace.points, trace.purified, *(mesh.vertices for mesh in meshes)]
    frame = ViewFrame.around(*_view(trace), np.concatenate([part.astype(np.float64) for part in parts]))
    pack = frame.pack

    def pack_mesh(mesh: Mesh | None) -> dict[str, str] | None:
        if mesh is None:
            return None
        index = "<u2" if len(mesh.vertices) <= LEVELS else "<u4"
        return {"vertices": pack(mesh.vertices), "faces": _base64(mesh.faces.astype(index))}

    return {
        "before": None if case.before is None else dataclasses.asdict(case.before),
        "after": None if case.after is None else dataclasses.asdict(case.after),
        "numbers": dataclasses.asdict(Numbers.of(trace, case.clean)),
        **frame.model(),
        "size": np.ptp(trace.kept.astype(np.float64), axis=0).tolist(),
        "outside": int(frame.far(trace.points).sum()),
        "points": pack(trace.points),
        "states": _base64(case.states()),
        "added": 0 if case.added is None else int(case.added.sum()),
        "mesh": pack_mesh(trace.mesh),
        "heat": _base64(np.rint(255 * heat(trace)).astype(np.uint8)),
        "repaired": pack_mesh(trace.repaired),
        "purified": pack(trace.purified),
    }


def _view(trace: Trace) -> tuple[NDArray[np.float64], float]:
    """Centre and radius of the views; distant outliers may lie outside."""
    purified, kept = trace.purified.astype(np.float64), trace.kept.astype(np.float64)
    centre = (purified.min(axis=0) + purified.max(axis=0)) / 2
    most = np.quantile(np.linalg.norm(kept - centre, axis=1), 0.99)
    return centre, float(max(most, np.linalg.norm(purified - centre, axis=1).max()))


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def render_png(
    cases: Sequence[Case], *, dpi: int = 150, azimuth: float = 35.0, elevation: float = 20.0
) -> bytes:
    """Renders a figure with one row per cloud: before, surface with anomalies, after; z is up.

    If a cloud has anomalies, the repaired surface comes before the last view.

    Args:
        cases: clouds to show, at least one.
        dpi: pixels per inch; a view is 3 inches high and wide.
        azimuth: azimuth of the viewer about the z axis, degrees.
        elevation: elevation of the viewer above the horizon, degrees.

    Returns:
        The bytes of a PNG file.

    Raises:
        ValueError: if there is no cloud.
    """
    if not cases:
        raise ValueError("there are no clouds to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    repaired = any(case.trace.mask is not None and case.trace.mask.any() for case in cases)
    columns = 4 if repaired else 3
    figure = Figure(figsize=(3 * columns, 3.05 * len(cases)), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.12 / len(cases), wspace=0.02, hspace=0.12
    )
    turn = _rotation(azimuth, elevation)
    for row, case in zip(axes, cases, strict=True):
        _draw_row(row, case, turn)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _rotation(azimuth: float, elevation: float) -> NDArray[np.float64]:
    """Rotation from the world, z up, to the screen: x right, y up, z towards the viewer."""
    a, e = np.radians([azimuth, elevation])
    towards = np.array([np.cos(e) * np.sin(a), -np.cos(e) * np.cos(a), np.sin(e)])
    right = np.array([np.cos(a), np.sin(a), 0.0])
    return np.stack([right, np.cross(towards, right), towards])


def _draw_row(row: Sequence[Axes], case: Case, turn: NDArray[np.float64]) -> None:
    trace, numbers = case.trace, Numbers.of(case.trace, case.clean)
    centre, radius = _view(trace)

    def project(points: NDArray[np.floating]) -> NDArray[np.float64]:
        projected: NDArray[np.float64] = ((points - centre) / radius) @ turn.T
        return projected

    before, middle, *repaired, after = row
    for state, colour in enumerate((KEPT, DROPPED, ANOMALY)):
        _draw_points(before, project(trace.points[case.states() == state]), colour)
    if trace.mesh is not None:
        _draw_mesh(middle, trace.mesh, heat(trace), project)
    for axis in repaired:
        if trace.repaired is not None:
            _draw_mesh(axis, trace.repaired, np.zeros(len(trace.repaired.vertices), np.float32), project)
    _draw_points(after, project(trace.purified), CLEAN)
    count = numbers.anomalies
    found = numbers.fallback or "surface"
    if count:
        found += f", {count} {'anomaly' if count == 1 else 'anomalies'}"
    repair = ["repaired surface"] * len(repaired)
    titles = [_caption(case.title, case.before), found, *repair, _caption("purified", case.after)]
    readings = [case.before, None, *[None] * len(repaired), case.after]
    for axis, title, reading in zip(row, titles, readings, strict=True):
        wrong = reading is not None and not reading.correct
        axis.set_title(title, fontsize=9, color=ANOMALY if wrong else INK, pad=3)
        axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
        axis.set_axis_off()


def _caption(name: str, reading: Reading | None) -> str:
    return name if reading is None else f"{name}: read as {reading.label}"


def _draw_points(axis: Axes, points: NDArray[np.float64], colour: str) -> None:
    from matplotlib.colors import to_rgb

    points = points[np.argsort(points[:, 2])]
    # Distant points fade to the background, to show depth.
    fade = np.clip(0.5 - 0.5 * points[:, 2:], 0, 1) * 0.75
    colours = (1 - fade) * np.array(to_rgb(colour)) + fade
    axis.scatter(points[:, 0], points[:, 1], s=5, c=colours, linewidths=0)


def _draw_mesh(axis: Axes, mesh: Mesh, warmth: NDArray[np.float32], project: Any) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    corners = project(mesh.vertices)[mesh.faces]  # (F, 3, 3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    front = normals[:, 2] > 0
    order = np.flatnonzero(front)[np.argsort(corners[front, :, 2].mean(axis=1))]
    light = 0.45 + 0.55 * np.clip(normals[order] @ np.array([-0.35, 0.55, 0.76]), 0, 1)
    share = warmth[mesh.faces[order]].mean(axis=1)[:, None]
    colours = light[:, None] * ((1 - share) * np.array(to_rgb(SURFACE)) + share * np.array(to_rgb(ANOMALY)))
    # Edges in the colour of their faces hide the gaps between antialiased triangles.
    axis.add_collection(
        PolyCollection(corners[order, :, :2], facecolors=colours, edgecolors=colours, linewidths=0.3)
    )
