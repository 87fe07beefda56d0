"""The report in a browser: layout at two widths, keys, no external requests."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, chromium
from numpy.typing import NDArray

from ifdefense.geometry.mesh import Mesh
from ifdefense.purifiers.base import Trace
from ifdefense.report import Case, Reading, Table, render_html

WIDTHS = {360: 2.0, 1400: 1.0}
"""CSS pixels, and device pixels for each."""


def ball(count: int, radius: float, seed: int) -> NDArray[np.float64]:
    normal = np.random.default_rng(seed).normal(size=(count, 3))
    return radius * normal / np.linalg.norm(normal, axis=1, keepdims=True)


def octahedron(radius: float) -> Mesh:
    corners = radius * np.float64([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    faces = [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
    return Mesh(corners, np.int64(faces))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of balls of radius 20, among them one with a point very far away; titles repeat."""
    points = ball(1600, 20.0, 0)
    far = points.copy()
    far[0] = [1e5, 0, 0]
    cases = []
    for cloud in (points, far):
        mask = np.arange(6) == 4
        trace = Trace(
            points=cloud,
            kept_mask=np.arange(1600) >= 30,
            mesh=octahedron(20.0),
            score=np.where(mask, 2.0, 0.0).astype(np.float32),
            mask=mask,
            repaired=octahedron(18.0),
            purified=ball(1600, 20.0, 1),
            fallback=None,
            seconds={"outliers": 0.01, "resampling": 0.02},
        )
        cases.append(Case("scans/ball.ply", trace, before=Reading("cup", False), after=Reading("ball", True)))
    header = ["defence", *(f"attack number {i}" for i in range(8))]
    table = Table("Accuracy", header, [[name, *["88.0 %"] * 8] for name in ("none", "sor")])
    html = render_html(cases, title="Two balls", facts={"method": "sor"}, tables=[table], total=40)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium("--enable-unsafe-swiftshader") as opened:
        yield opened


def show(browser: Browser, page: Path, width: int, **options: Any) -> None:
    """Opens the page and waits until its first view is drawn."""
    browser.open(page, width, 700, **options)
    scroll_to(browser, 0)


def scroll_to(browser: Browser, index: int) -> None:
    """Waits until a view is drawn, which happens when it comes near the window."""
    view = f"document.querySelectorAll('canvas')[{index}]"
    browser.evaluate(f"{view}.scrollIntoView()")
    browser.wait(f"{view}.dataset.yaw")


def shown(browser: Browser, index: int) -> NDArray[np.bool_]:
    """Which pixels of a view are painted, without the corner with the axes."""
    scroll_to(browser, index)
    mask = browser.canvas(index)[..., 3] > 0
    size = len(mask)
    mask[-size // 5 :, -size // 5 :] = False
    return np.asarray(mask)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_window_and_every_view_is_filled(browser: Browser, page: Path, width: int) -> None:
    show(browser, page, width, ratio=WIDTHS[width])
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1"
    assert browser.evaluate(f"{wide} && getComputedStyle(e).overflowX !== 'visible').length") == 0
    # Nor does a caption leave its figure.
    assert (
        browser.evaluate(
            "Math.max(...[...document.querySelectorAll('figure')].map(figure => Math.max("
            "...[...figure.querySelectorAll('*')].map(e => e.getBoundingClientRect().right)) "
            "- figure.getBoundingClientRect().right))"
        )
        <= 0
    )
    assert browser.evaluate("document.querySelectorAll('canvas').length") == 6
    for index in range(3):
        mask = shown(browser, index)
        assert mask.shape[0] == mask.shape[1] > 250
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        # A ball fills nine tenths of a view, in both directions and about its middle; an octahedron less.
        for filled in (rows, columns):
            assert filled[-1] - filled[0] > (0.6 if index == 1 else 0.8) * len(mask)
            assert abs(filled[0] + filled[-1] - len(mask)) < 0.12 * len(mask)


@pytest.mark.parametrize("width", [150, 290])
def test_small_views_are_whole(browser: Browser, page: Path, width: int) -> None:
    """Views of at most 300 device pixels once lost their upper half."""
    show(browser, page, width + 56)
    mask = shown(browser, 0)
    assert 100 < len(mask) <= 300
    upper, lower = mask[: len(mask) // 2].mean(), mask[len(mask) // 2 :].mean()
    assert 0.6 < upper / lower < 1.6


def test_keys_turn_zoom_and_reset_the_views_of_a_cloud(browser: Browser, page: Path) -> None:
    show(browser, page, 1400)
    browser.evaluate("document.querySelector('canvas').focus()")
    pose = "(d => [+d.yaw, +d.pitch, +d.zoom, d.up])(document.querySelectorAll('canvas')[%d].dataset)"
    home, before = browser.evaluate(pose % 0), browser.canvas(0)
    other = browser.canvas(3)
    assert home == pytest.approx([34.4, 20.1, 1.0, "z"])
    for key, place, sign in [
        ("ArrowLeft", 0, 1),
        ("ArrowRight", 0, -1),
        ("ArrowUp", 1, -1),
        ("ArrowDown", 1, 1),
        ("+", 2, 1),
        ("-", 2, -1),
    ]:
        browser.press(key)
        moved = browser.evaluate(pose % 0)
        assert np.sign(moved[place] - home[place]) == sign, key
        assert (browser.canvas(0) != before).any(), key
        assert browser.evaluate(pose % 1) == moved  # the three views of a cloud turn together
        browser.press("0")
        assert browser.evaluate(pose % 0) == home
        np.testing.assert_array_equal(browser.canvas(0), before)
    np.testing.assert_array_equal(browser.canvas(3), other)  # another cloud stays as it was
    browser.press("u")
    assert browser.evaluate(pose % 3)[3] == "y"
    assert (browser.canvas(1) != before).any()
    browser.press("u")
    browser.press("ArrowLeft")
    browser.evaluate(
        "[...document.querySelectorAll('button')].find(b => /reset/.test(b.textContent)).click()"
    )
    browser.settle()
    assert browser.evaluate(pose % 0) == home


def test_the_keys_are_on_the_page(browser: Browser, page: Path) -> None:
    browser.open(page, 360, 900)
    described = "document.getElementById(document.querySelector('canvas').getAttribute('aria-describedby'))"
    text = browser.evaluate(f"{described}.innerText")
    for word in ("←", "turn", "zoom", "reset", "up axis", "Ctrl"):
        assert word in text


def test_the_scale_bar_has_the_length_it_says(browser: Browser, page: Path) -> None:
    show(browser, page, 1400)
    bar = "(s => [s.firstChild.getBoundingClientRect().width, parseFloat(s.innerText)])"
    pixels, units = browser.evaluate(f"{bar}(document.querySelector('.scale'))")
    assert units in (5, 10)
    columns = np.flatnonzero(shown(browser, 2).any(0))  # a ball of radius 20 is seen a little larger
    assert (columns[-1] - columns[0]) / 40 == pytest.approx(pixels / units, rel=0.08)
    browser.evaluate("document.querySelector('canvas').focus()")
    for _ in range(5):  # twice as large
        browser.press("+")
    near, fewer = browser.evaluate(f"{bar}(document.querySelector('.scale'))")
    assert near / fewer == pytest.approx(pixels / units * 1.15**5, rel=0.02)


def test_what_the_page_says(browser: Browser, page: Path) -> None:
    show(browser, page, 1400)
    text = browser.evaluate("document.body.innerText")
    assert "Only 2 of 40 clouds are shown." in text
    assert browser.evaluate("[...document.querySelectorAll('h2')].map(e => e.lastChild.data)") == [
        "scans/ball.ply (1)",
        "Accuracy",
        "scans/ball.ply (2)",
    ]
    assert len(re.findall("1 too far away to show", text)) == 1
    assert re.search(r"size\n\s*(39\.\d|40) × (39\.\d|40) × (39\.\d|40)", text)


def test_it_loads_nothing_and_the_policy_forbids_it(browser: Browser, page: Path) -> None:
    browser.open(page, 360, 900)
    assert browser.requests() == [page.as_uri()]
    for code in (
        "fetch('data:text/plain,x')",
        "new Promise((done, fail) => { const image = new Image(); image.onload = done; "
        "image.onerror = () => fail(Error('Failed to load')); "
        "image.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw='; })",
    ):
        with pytest.raises(RuntimeError, match="Failed to"):
            browser.evaluate(code)
    browser.evaluate(
        "const other = document.createElement('script'); other.textContent = 'window.broken = 1'; "
        "document.body.append(other)"
    )
    assert browser.evaluate("window.broken === undefined")


def test_light_and_dark_are_both_readable(browser: Browser, page: Path) -> None:
    from PIL import Image

    means = []
    for dark in (False, True):
        browser.open(page, 1400, 900, dark=dark)
        image = Image.open(io.BytesIO(browser.screenshot())).convert("L")
        assert image.size == (1400, 900)
        values = np.asarray(image).astype(float)
        means.append(values.mean())
        assert values.max() - values.min() > 150
    assert means[0] > 200 and means[1] < 60


def test_without_webgl_points_are_drawn(page: Path) -> None:
    with chromium("--disable-gpu", "--disable-3d-apis") as plain:
        show(plain, page, 1400)
        assert plain.evaluate("gl === null")
        mask = shown(plain, 0)
        rows = np.flatnonzero(mask.any(1))
        assert rows[-1] - rows[0] > 0.75 * len(mask)
        assert plain.complaints() == []
