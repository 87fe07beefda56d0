"""The report: numbers against closed forms, page and picture."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from numpy.typing import NDArray

from ifdefense.geometry.mesh import Mesh
from ifdefense.purifiers.base import Trace
from ifdefense.report import LEVELS, Case, Numbers, Reading, Table, heat, render_html, render_png

Points = NDArray[np.float32]
OCTAHEDRON = Mesh(
    np.float32([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]) / 2,
    np.int64([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]),
)


def trace_of(points: Points, purified: Points, *, dropped: int = 0, anomalous: tuple[int, ...] = ()) -> Trace:
    """A trace whose surface is two octahedra, some of its twelve vertices anomalous."""
    mesh = Mesh(
        np.concatenate([OCTAHEDRON.vertices, OCTAHEDRON.vertices + np.float32([2, 0, 0])]),
        np.concatenate([OCTAHEDRON.faces, OCTAHEDRON.faces + 6]),
    )
    mask = np.isin(np.arange(12), anomalous)
    return Trace(
        points=points,
        kept_mask=np.arange(len(points)) >= dropped,
        mesh=mesh,
        score=np.where(mask, 2.0, 0.5).astype(np.float32),
        mask=mask,
        repaired=OCTAHEDRON,
        purified=purified,
        fallback=None,
        seconds={"outliers": 0.25, "mesh repair": 0.5},
    )


def content(page: str) -> dict[str, object]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, object] = json.loads(found[1])
    return data


def test_numbers_of_a_shifted_cloud(sphere_cloud: Points) -> None:
    lattice = np.stack(np.meshgrid(*[np.arange(5.0)] * 3), -1).reshape(-1, 3).astype(np.float32)
    shifted = lattice + np.float32([0.25, 0, 0])
    numbers = Numbers.of(trace_of(lattice, shifted, dropped=0), clean=shifted)
    # Each point's nearest neighbour is its own copy, 0.25 away in both directions, of a side of 4.
    assert numbers.moved == pytest.approx(2 * 0.25 / 4)
    assert numbers.before == pytest.approx(2 * 0.25 / 4)
    assert numbers.after == 0
    assert Numbers.of(trace_of(sphere_cloud, sphere_cloud)).before is None


@pytest.mark.parametrize(
    ("anomalous", "regions", "share"),
    [
        ((), 0, 0.0),
        ((0, 2, 4), 1, 1 / 16),
        (tuple(range(6)), 1, 0.5),
        ((0, 1), 2, 0.0),
        (tuple(range(12)), 2, 1.0),
    ],
)
def test_numbers_count_anomalous_regions(
    anomalous: tuple[int, ...], regions: int, share: float, sphere_cloud: Points
) -> None:
    numbers = Numbers.of(trace_of(sphere_cloud, sphere_cloud[:500], dropped=24, anomalous=anomalous))
    assert (numbers.anomalies, numbers.dropped, numbers.points, numbers.purified) == (regions, 24, 1024, 500)
    assert numbers.anomalous_area == pytest.approx(share)
    assert numbers.faces == 16


def test_heat_is_full_only_where_the_surface_was_taken_out(sphere_cloud: Points) -> None:
    warmth = heat(trace_of(sphere_cloud, sphere_cloud, anomalous=(3, 7)))
    assert np.flatnonzero(warmth == 1).tolist() == [3, 7]
    assert np.delete(warmth, [3, 7]).max() <= 0.5


def test_page_holds_the_points_to_within_its_resolution(sphere_cloud: Points, box_cloud: Points) -> None:
    page = render_html([Case("sphere", trace_of(sphere_cloud, box_cloud))], title="A title")
    (case,) = content(page)["cases"]  # type: ignore[misc]
    for name, expected in (("points", sphere_cloud), ("purified", box_cloud)):
        steps = np.frombuffer(base64.b64decode(case[name]), "<u2").reshape(-1, 3).astype(float)
        low, span = np.float64([-0.5, -0.5, -0.5]), 3.0  # of both octahedra
        assert np.abs(steps / LEVELS * span + low - expected).max() <= span / LEVELS
    faces = np.frombuffer(base64.b64decode(case["mesh"]["faces"]), "<u2")
    assert faces.reshape(-1, 3)[:8].tolist() == OCTAHEDRON.faces.tolist()


def test_page_needs_nothing_but_itself(sphere_cloud: Points) -> None:
    page = render_html([Case("sphere", trace_of(sphere_cloud, sphere_cloud))], title="t")
    assert not re.search(r"""(src|href)\s*=|url\(|https?://|@import|fetch\(""", page)
    assert "{{" not in page
    assert "default-src 'none'; script-src 'sha256-" in page


def test_titles_that_repeat_are_numbered(sphere_cloud: Points) -> None:
    trace = trace_of(sphere_cloud, sphere_cloud)
    names = ["a", "b", "a", "a (1)", "a"]
    cases = content(render_html([Case(name, trace) for name in names], title="t"))["cases"]
    assert [case["title"] for case in cases] == ["a (2)", "b", "a (3)", "a (1)", "a (4)"]  # type: ignore[attr-defined]


def test_page_knows_how_many_clouds_there_are(sphere_cloud: Points) -> None:
    case = Case("sphere", trace_of(sphere_cloud, sphere_cloud))
    assert content(render_html([case], title="t"))["total"] == 1
    assert content(render_html([case], title="t", total=40))["total"] == 40
    with pytest.raises(ValueError, match="2 clouds are shown, total cannot be 1"):
        render_html([case] * 2, title="t", total=1)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1000.0, 4.5e6)])
def test_a_point_far_away_leaves_the_others_their_resolution(
    sphere_cloud: Points, scale: float, shift: float
) -> None:
    points = sphere_cloud.astype(np.float64)
    points[0] = [1e6, 0, 0]
    points = points * scale + shift
    trace = Trace(points, np.arange(1024) > 0, None, None, None, None, points[1:], None, {})
    (case,) = content(render_html([Case("sphere", trace)], title="t"))["cases"]  # type: ignore[misc]
    assert case["outside"] == 1
    assert case["size"] == pytest.approx([scale] * 3, rel=0.01)
    steps = np.frombuffer(base64.b64decode(case["points"]), "<u2").reshape(-1, 3).astype(float)
    placed = (steps - case["centre"]) * case["step"] / scale
    np.testing.assert_allclose(placed[1:], sphere_cloud[1:] - 0.0, atol=0.01)
    # The step of the lattice is fine enough, and the far point lies in its direction, out of sight.
    assert case["step"] / scale < 1e-4
    assert placed[0] == pytest.approx([4.0, 0, 0], abs=0.02)


def test_figures_that_are_not_finite_are_an_error(sphere_cloud: Points) -> None:
    trace = trace_of(sphere_cloud, sphere_cloud)
    trace.seconds["outliers"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        render_html([Case("sphere", trace)], title="t")


def test_names_cannot_break_out_of_the_page(sphere_cloud: Points) -> None:
    name = '</script><script>alert("x")</script>'
    trace = trace_of(sphere_cloud, sphere_cloud)
    page = render_html(
        [Case(name, trace, before=Reading("cup", False), after=Reading("ball", True))],
        title=name,
        facts={"method": name},
        tables=[Table(name, ["", "a"], [[name, "1"]])],
    )
    assert "alert" in page
    assert page.count("</script>") == 2
    data = content(page)
    assert data["title"] == name
    assert data["cases"][0]["before"] == {"label": "cup", "correct": False}  # type: ignore[index]


def test_picture_has_a_row_a_cloud(sphere_cloud: Points) -> None:
    from PIL import Image

    clean = Case("clean", trace_of(sphere_cloud, sphere_cloud))
    wrong = Case(
        "attacked", trace_of(sphere_cloud, sphere_cloud, anomalous=(0, 2, 4)), before=Reading("cup", False)
    )
    one, two = (Image.open(io.BytesIO(render_png(cases, dpi=50))) for cases in ([clean], [clean, wrong]))
    assert (one.width, two.width) == (450, 600)  # with anomalies there is a view of the repaired surface
    assert abs(two.height - 2 * one.height) <= 1
    red = np.asarray(two.convert("RGB")).astype(int)
    red = (red[..., 0] > red[..., 1] + 80) & (red[..., 0] > red[..., 2] + 80)
    half = two.height // 2
    assert not red[:half, 150:300].any()
    assert red[half:, 150:300].sum() > 20
    assert not red[:, 300:450].any()


def test_added_points_are_drawn_in_the_colour_of_anomalies(sphere_cloud: Points) -> None:
    from PIL import Image

    added = np.arange(1024) >= 1000
    case = Case("attacked", trace_of(sphere_cloud, sphere_cloud, dropped=10), added=added)
    assert np.bincount(case.states()).tolist() == [990, 10, 24]
    picture = np.asarray(Image.open(io.BytesIO(render_png([case], dpi=50))).convert("RGB")).astype(int)
    red = (picture[..., 0] > picture[..., 1] + 80) & (picture[..., 0] > picture[..., 2] + 40)
    assert red[:, :150].sum() > 5 and not red[:, 300:].any()
    (shown,) = content(render_html([case], title="t"))["cases"]  # type: ignore[misc]
    assert shown["added"] == 24
    assert np.frombuffer(base64.b64decode(shown["states"]), np.uint8).tolist() == case.states().tolist()


def test_fallback_is_shown(sphere_cloud: Points) -> None:
    trace = Trace(
        sphere_cloud,
        np.ones(1024, bool),
        None,
        None,
        None,
        None,
        sphere_cloud,
        "the network yields no surface",
        {},
    )
    numbers = Numbers.of(trace)
    assert (numbers.faces, numbers.anomalies, numbers.fallback) == (0, 0, "the network yields no surface")
    assert "the network yields no surface" in render_html([Case("flat", trace)], title="t")
    assert render_png([Case("flat", trace)], dpi=30).startswith(b"\x89PNG")


def test_picture_of_nothing() -> None:
    with pytest.raises(ValueError, match="no clouds to draw"):
        render_png([])
