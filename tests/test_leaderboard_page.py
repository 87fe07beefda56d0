"""The leaderboard in a browser: sorting, filters and flags by keyboard, layout, charts, no requests."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, chromium
from synthetic_results import FLAG, result

from benchmarks import cards, report

LEVELS = {"none": 20, "sor": 40, "sor-smooth": 55, "Denoise": 60, "local-random": 66}
ABOUT = {
    "authors": "A. Author",
    "link": "https://example.org/paper",
    "venue": "CVPR 2026",
    "needs": "nothing",
    "measured_by": "A. Author",
}
ROWS = "[...document.querySelectorAll('#board tbody tr:not(.more)')]"
FIRST = f"{ROWS}.map(row => row.querySelector('th button').innerText.trim())"
SORTED = (
    "[...document.querySelectorAll('#board th[aria-sort]')].filter(th => th.ariaSort !== 'none')"
    ".map(th => [th.innerText.trim(), th.ariaSort])"
)
BUTTON = "[...document.querySelectorAll('#board thead button')].find(b => b.innerText.startsWith(%r))"
SELECT = (
    "[...document.querySelectorAll('label')].find(l => l.innerText.startsWith(%r)).querySelector('select')"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one of procedural clouds with examples, and a smaller one of ModelNet40."""
    wide = result("Denoise", LEVELS, flags=[FLAG], examples=1, certified=True)
    other = result(
        "sor",
        {"none": 5, "sor": 62},
        data="modelnet40",
        suite="standard",
        victims=("pointnet-modelnet40",),
    )
    card = cards.make([wide], "Denoise", ABOUT)
    others = {**wide, "name": "local-random", "row": "local-random", "flags": []}
    others["figures"] = [each for each in wide["figures"] if each["defence"] != "Denoise"]
    others["cells"] = [each for each in wide["cells"] if each["defence"] != "Denoise"]
    board = report.leaderboard([others, other], [card])
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    path.write_text(report.page(board, [wide]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium("--enable-unsafe-swiftshader") as opened:
        yield opened


def choose(browser: Browser, label: str, option: str) -> None:
    select = SELECT % label
    browser.evaluate(
        f"(s => {{ s.value = [...s.options].find(o => o.text === {option!r}).value; "
        f"s.dispatchEvent(new Event('change')); }})({select})"
    )


def test_it_sorts_by_keyboard_and_says_so(browser: Browser, page: Path) -> None:
    browser.open(page, 1440)
    choose(browser, "Victim", "pointnet-procedural")
    worst = ["local-random", "Denoise", "sor-smooth", "sor", "none"]
    assert browser.evaluate(FIRST) == worst
    assert browser.evaluate(SORTED) == [["Worst", "descending"]]
    browser.evaluate(f"{BUTTON % 'Worst'}.focus()")
    browser.press("Enter")
    assert browser.evaluate(FIRST) == worst[::-1]
    assert browser.evaluate(SORTED) == [["Worst", "ascending"]]
    assert browser.evaluate("document.activeElement.innerText.trim()") == "Worst"
    browser.evaluate(f"{BUTTON % 'Defence'}.focus()")
    browser.press(" ")
    assert browser.evaluate(FIRST) == ["Denoise", "local-random", "none", "sor", "sor-smooth"]
    assert browser.evaluate("document.querySelector('[role=status]').innerText") == (
        "5 rows, sorted by Defence, A to Z."
    )
    # What was not measured is last in both directions.
    for _ in range(2):
        browser.evaluate(f"{BUTTON % 'ms'}.click()")
        assert browser.evaluate(FIRST)[-1] == "none"
    assert browser.complaints() == []


def test_filters_choose_runs_victims_and_threat_models(browser: Browser, page: Path) -> None:
    browser.open(page, 1440)
    assert browser.evaluate(f"{SELECT % 'Data'}.selectedOptions[0].text") == "procedural, quick"
    assert browser.evaluate(f"{ROWS}.length") == 5
    header = "[...document.querySelectorAll('#board thead th')].map(th => th.innerText.trim())"
    assert "Victim" not in browser.evaluate(header)
    choose(browser, "Victim", "all victims")
    choose(browser, "Threat", "side by side")
    assert browser.evaluate(f"{ROWS}.length") == 5 * 2 * 3
    assert {"Victim", "Threat model"} <= {*browser.evaluate(header)}
    choose(browser, "Threat", "budgets of IF-Defense")
    assert browser.evaluate(f"{ROWS}.length") == 10
    titles = "[...document.querySelectorAll('#attacks tbody th')].map(th => th.innerText.trim())"
    assert {*browser.evaluate(titles)} == {"clean", "Square, L∞ 0.08", "PGD"}
    choose(browser, "Data", "modelnet40, standard")
    assert browser.evaluate(FIRST) == ["sor", "none"]
    # Published figures are there only for this run, and say what differs.
    published = browser.evaluate("document.getElementById('attacks').innerText")
    assert "87.9 IF-Defense differs: 2,468 clouds, a classifier trained for that defence" in published
    assert browser.complaints() == []


def test_flags_and_cards_open_beside_the_figure(browser: Browser, page: Path) -> None:
    browser.open(page, 1440)
    choose(browser, "Victim", "pointnet-procedural")
    row = f"{ROWS}.find(row => row.innerText.startsWith('Denoise'))"
    assert "masked-gradients" in browser.evaluate(f"{row}.innerText")
    assert FLAG["says"] not in browser.evaluate(f"{row}.innerText")
    browser.evaluate(f"{row}.querySelector('.flag summary').focus()")
    browser.press("Enter")
    assert FLAG["says"] in browser.evaluate(f"{row}.innerText")
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.evaluate(f"{row}.querySelector('th button').focus()")
    browser.press("Enter")
    more = f"{row}.nextSibling"
    told = browser.evaluate(f"{more}.innerText")
    for word in ("A. Author", "CVPR 2026", "0123456789abcdef", "0.1.0", "deterministic"):
        assert word in told
    assert browser.evaluate(f"{more}.querySelector('a').href") == "https://example.org/paper"
    assert browser.evaluate("document.activeElement.ariaExpanded") == "true"
    browser.press("Enter")
    assert browser.evaluate("document.querySelectorAll('.more').length") == 0
    others = browser.evaluate(f"{ROWS}.filter(row => row.querySelector('.flag')).length")
    assert others == 1


def test_charts_show_what_was_measured(browser: Browser, page: Path) -> None:
    browser.open(page, 1440)
    choose(browser, "Victim", "pointnet-procedural")
    chart = "document.querySelector('[aria-label=\"Accuracy against budget\"]')"
    titles = f"[...{chart}.querySelectorAll('title')].map(t => t.textContent)"
    choose(browser, "Norm", "L∞, of a coordinate")
    found = browser.evaluate(titles)
    assert len(found) == 5 * 3  # clean, 0.05 and 0.08
    # The lower of the adaptive and the static accuracy.
    assert "Denoise: 55.0, Square, L∞ 0.08" in found
    choose(browser, "Norm", "points dropped")
    assert len(browser.evaluate(titles)) == 5 * 2
    ticks = browser.evaluate(f"[...{chart}.querySelectorAll('text')].map(t => t.textContent)")
    assert "200" in ticks
    speed = "document.querySelector('[aria-label=\"Accuracy against time\"]')"
    points = browser.evaluate(f"[...{speed}.querySelectorAll('title')].map(t => t.textContent)")
    assert {point.split(":")[0] for point in points} == {*LEVELS} - {"none"}
    certified = browser.evaluate("document.querySelector('.certified').innerText")
    assert "Certified: voting, pointnet-procedural" in certified


def test_examples_turn_until_they_are_stopped(browser: Browser, page: Path) -> None:
    browser.open(page, 1440)
    browser.evaluate("document.querySelector('canvas').scrollIntoView()")
    view = "document.querySelectorAll('canvas')[%d]"
    browser.wait(f"{view % 0}.dataset.yaw")
    yaw = f"+{view % 0}.dataset.yaw"
    before = browser.evaluate(yaw)
    browser.wait(f"{yaw} !== {before}")
    browser.evaluate("document.getElementById('turning').focus()")
    browser.press("Enter")
    still = browser.evaluate(yaw)
    browser.settle()
    assert browser.evaluate(yaw) == still
    assert browser.evaluate(f"{view % 2}.dataset.yaw") == browser.evaluate(f"{view % 0}.dataset.yaw")
    assert (browser.canvas(1)[..., 3] > 0).sum() > 500
    browser.evaluate(f"{view % 0}.focus()")
    browser.press("ArrowLeft")
    assert browser.evaluate(yaw) != still
    text = browser.evaluate("document.getElementById('example-1').innerText")
    assert "read as cup" in text and "Denoise in front of pointnet-procedural" in text


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_it_fits_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    choose(browser, "Victim", "pointnet-procedural")
    for _ in LEVELS:
        browser.evaluate("document.querySelector('#board tbody [aria-expanded=false]').click()")
    browser.evaluate("document.querySelectorAll('#board summary').forEach(each => each.click())")
    assert browser.complaints() == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # No column is squeezed to a few letters.
    narrow = "[...document.querySelectorAll('#board p, #board dd')].map(e => e.clientWidth)"
    assert min(browser.evaluate(narrow)) > 120
    board = "document.querySelector('.scroll')"
    assert browser.evaluate(f"{board}.scrollWidth <= {board}.clientWidth")
    # Nothing is cut off, and every header can be pressed.
    right = "[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right)"
    assert browser.evaluate(f"Math.max(...{right})") <= width + 1
    assert browser.evaluate(
        "[...document.querySelectorAll('#board thead button')].every(b => b.offsetWidth > 20)"
    )


def test_it_is_readable_in_light_and_dark_and_loads_nothing(browser: Browser, page: Path) -> None:
    from PIL import Image

    means = []
    for dark in (False, True):
        browser.open(page, 1440, dark=dark)
        assert browser.requests() == [page.as_uri()]
        values = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("L")).astype(float)
        means.append(values.mean())
        assert values.max() - values.min() > 150
    assert means[0] > 200 and means[1] < 60
