"""Reports of results, and the cards of the leaderboard."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import grid_parts
import jsonschema
import pytest
import torch
from click.testing import CliRunner
from synthetic_results import FLAG, result

import benchmarks
from benchmarks import cards, evaluate, published, report, submit
from benchmarks.cli import main
from benchmarks.flags import FLAGS
from benchmarks.shards import StoreError

LEVELS = {"none": 20, "sor": 40, "sor-smooth": 55, "Denoise": 60}
ABOUT = {
    "authors": "A. Author",
    "link": "https://example.org/paper",
    "venue": "",
    "needs": "nothing",
    "measured_by": "A. Author",
}
CARDS = sorted(
    path for path in Path(cards.__file__).parent.glob("entries/*.json") if path.name != "schema.json"
)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return result("Denoise", LEVELS, flags=[FLAG])


def row_of(board: dict[str, Any], defence: str, victim: str, family: str = "all") -> dict[str, Any]:
    keys = (defence, victim, family)
    (found,) = [r for r in board["rows"] if (r["defence"], r["victim"], r["family"]) == keys]
    assert isinstance(found, dict)
    return found


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_row_has_the_figures_of_the_result_and_its_own_flags(measured: dict[str, Any]) -> None:
    board = report.leaderboard([measured])
    row = row_of(board, "Denoise", "pointnet-procedural")
    (figures,) = [
        each
        for each in measured["figures"]
        if (each["defence"], each["victim"], each["family"]) == ("Denoise", "pointnet-procedural", "all")
    ]
    for name in ("clean", "adaptive", "worst"):
        assert row[name] == figures[name]
    # A mean over attacks: its spread is not that of draws.
    assert row["static"]["accuracy"] == 60 and "spread" not in row["static"]
    assert [flag["says"] for flag in row["flags"]] == [FLAG["says"]]
    assert row_of(board, "Denoise", "dgcnn-procedural")["flags"] == []
    assert row_of(board, "sor", "pointnet-procedural")["flags"] == []
    # It is about an attack of the other family.
    assert row_of(board, "Denoise", "pointnet-procedural", "if-defense")["flags"] == []
    assert row["milliseconds"] == 24.0
    assert row_of(board, "none", "pointnet-procedural")["milliseconds"] is None


def test_differences_are_of_the_worst_case_on_the_same_clouds() -> None:
    made = result("Denoise", LEVELS, victims=("pointnet-procedural",))
    right = {"sor-smooth": "1110" * 10, "Denoise": "1111" * 10}
    for cell in made["cells"]:
        if cell["defence"] in right:
            cell["right"] = [right[cell["defence"]]]
    # One attack that only Denoise loses to, on the first four clouds.
    (lost,) = [
        c
        for c in made["cells"]
        if (c["defence"], c["source"], c["knowledge"]) == ("Denoise", "pgd", "static")
    ]
    lost["right"] = ["0" * 4 + "1" * 36]
    board = report.leaderboard([made])
    difference = row_of(board, "Denoise", "pointnet-procedural")["difference"]
    assert difference["difference"] == pytest.approx(100 * (36 - 30) / 40)
    assert difference["low"] < difference["difference"] < difference["high"]
    recent = row_of(board, "Denoise", "pointnet-procedural", "recent")["difference"]
    assert recent["difference"] == pytest.approx(100 * (40 - 30) / 40)
    assert row_of(board, "sor-smooth", "pointnet-procedural")["difference"] is None


def test_of_two_measurements_the_one_with_more_clouds_stays_then_the_newer(measured: dict[str, Any]) -> None:
    older, fewer = copy.deepcopy(measured), copy.deepcopy(measured)
    older["date"], fewer["date"] = "2026-01-01", "2027-01-01"
    for figures in fewer["figures"]:
        figures["clouds"] = 20
    for order in ([older, measured, fewer], [fewer, measured, older]):
        row = row_of(report.leaderboard(order), "Denoise", "dgcnn-procedural")
        assert (row["clouds"], row["measured"]["date"]) == (40, measured["date"])
    other = result("Denoise", LEVELS, suite="standard")
    assert len(report.leaderboard([measured, other])["rows"]) == 2 * len(
        report.leaderboard([measured])["rows"]
    )


def test_corruptions_have_a_mean_and_no_worst_case() -> None:
    made = result("Denoise", LEVELS, victims=("pointnet-procedural",))
    mean = {"accuracy": 71.0, "error": 2.0, "class_mean": 71.0, "spread": 5.0}
    row = {"victim": "pointnet-procedural", "defence": "Denoise", "family": "corruption", "clouds": 40}
    made["figures"].append({**row, "clean": mean, "static": mean, "adaptive": None, "worst": None})
    board = report.leaderboard([made])
    found = row_of(board, "Denoise", "pointnet-procedural", "corruption")
    assert (found["static"]["accuracy"], found["worst"], found["difference"]) == (71.0, None, None)
    assert board["rows"][-1] == found  # after the rows with a worst case
    assert "| Denoise | – | – | 71.0 ± 2.0 | 71.0 ± 2.0 (draws ± 5.0) | – |" in report.markdown(board)
    jsonschema.validate(cards.make([made], "Denoise", ABOUT), cards.schema())


def test_markdown_says_in_words_what_the_headline_is(measured: dict[str, Any]) -> None:
    text = report.markdown(report.leaderboard([measured]))
    assert "minimum per cloud, not an average" in text
    assert f"`Denoise`, **masked-gradients** (apgd-linf): {FLAG['says']}" in text
    first = next(line for line in text.splitlines() if line.startswith("| Denoise |"))
    assert re.match(r"\| Denoise \| \d+\.\d ± \d+\.\d \| \d+\.\d ± ", first)
    lines = [line.split("|")[1].strip() for line in text.partition("## dgcnn")[2].splitlines()[2:8]]
    assert lines[2:] == ["Denoise", "sor-smooth", "sor", "none"]  # the highest worst case first


def test_published_figures_only_where_the_protocol_is_the_same() -> None:
    (ours,) = published.comparable("modelnet40", "pointnet-modelnet40", "sor", "perturb")
    assert (ours["paper"], ours["accuracy"]) == ("IF-Defense", 82.81)
    assert "2,468 clouds" in ours["differs"] and "trained for that defence" in ours["differs"]
    papers = published.comparable("modelnet40", "pointnet-modelnet40-hybrid", "sor", "drop-200")
    assert [(each["paper"], each["accuracy"]) for each in papers] == [("IF-Defense", 42.59), ("PCLD", 71.0)]
    (pcld,) = published.comparable("modelnet40", "pct-modelnet40", "local-mesh", "pgd-linf")
    assert (pcld["accuracy"], "another purifier" in pcld["differs"]) == (69.3, True)
    for other in (
        ("procedural", "pointnet-procedural", "sor", "perturb"),
        ("modelnet40", "pointnet-modelnet40", "sor", "apgd-l2"),
        ("modelnet40", "pointnet-modelnet40", "none", "pgd-linf"),
        ("scanobjectnn", "pointnet-scanobjectnn", "sor", "drop-200"),
    ):
        assert published.comparable(*other) == []
    made = result("sor", {"none": 5, "sor": 60}, data="modelnet40", victims=("pointnet-modelnet40",))
    assert "42.6 IF-Defense: 2,468 clouds, a classifier trained for that defence" in report.markdown(
        report.leaderboard([made])
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "is not a result"),
        ('{"format": 9}', "has format 9; this version reads format 1"),
        ('{"format": 1, "name": "x"}', "'row' is missing or no str"),
        ('{"format": NaN}', "NaN is no figure"),
    ],
)
def test_a_file_that_is_no_result_is_skipped_and_named(text: str, reason: str, tmp_path: Path) -> None:
    measured = result("Denoise", LEVELS, victims=("pointnet-procedural",))
    bad, good, out = tmp_path / "bad.json", tmp_path / "good.json", tmp_path / "out"
    bad.write_text(text)
    good.write_text(json.dumps(measured))
    alone = invoke("report", bad, "-o", out, "--no-cards")
    assert alone.exit_code == 1 and not out.exists()
    both = invoke("report", bad, good, "-o", out, "--no-cards")
    assert both.exit_code == 1
    assert str(bad) in both.output and reason in both.output
    assert sorted(path.name for path in out.iterdir()) == sorted(report.FILES)
    board = json.loads((out / "leaderboard.json").read_text())
    assert {row["defence"] for row in board["rows"]} == set(LEVELS)
    again = invoke("report", good, "-o", out, "--no-cards")
    assert again.exit_code == 1 and "--force replaces it" in again.output
    assert invoke("report", good, "-o", out, "--no-cards", "--force").exit_code == 0


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_card_follows_the_schema(path: Path) -> None:
    card = cards.load_card(path)
    jsonschema.validate(card, cards.schema())
    assert path.name == cards.file_name(card["name"])
    runs = [(each["data"]["name"], each["suite"]) for each in card["results"]]
    assert len(runs) == len({*runs})


@pytest.mark.parametrize(("part", "key"), [("figures", "clouds"), ("cells", "source"), ("flags", "says")])
def test_a_result_without_a_part_is_named(part: str, key: str, tmp_path: Path) -> None:
    made = result("Denoise", LEVELS, victims=("pointnet-procedural",), flags=[FLAG])
    del made[part][-1][key]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match=rf"result.json is not a .*: {part}\[\d+\] has no '{key}'"):
        cards.load_result(path)


def test_submit_writes_a_card_that_follows_the_schema(tmp_path: Path, measured: dict[str, Any]) -> None:
    path, entries = tmp_path / "result.json", tmp_path / "entries"
    path.write_text(json.dumps(measured))
    said = [f"--{key.replace('_', '-')}={value}" for key, value in ABOUT.items() if value]
    for defence, file in (("mine.py:Denoise", "denoise.json"), ("sor", "sor.json")):
        made = invoke("submit", defence, "--result", path, *said, "-o", entries)
        assert made.exit_code == 0, made.output
        card = json.loads((entries / file).read_text())
        jsonschema.validate(card, cards.schema())
        assert {key: card[key] for key in ABOUT} == ABOUT
        assert "right" not in card["results"][0]["cells"][0]
        assert {cell["defence"] for cell in card["results"][0]["cells"]} == {card["name"]}
    # A board of cards is that of their results.
    kept = [cards.load_card(entries / name) for name in ("denoise.json", "sor.json")]
    full, board = report.leaderboard([measured]), report.leaderboard([], kept)
    for defence in ("Denoise", "sor"):
        mine, same = (row_of(each, defence, "dgcnn-procedural") for each in (board, full))
        assert mine.pop("about")["authors"] == "A. Author" and same.pop("about") is None
        assert mine == same
    for defence in ("Denoise", "sor"):
        of = [[cell for cell in each["cells"] if cell["defence"] == defence] for each in (board, full)]
        assert of[0] == of[1]


def test_a_card_keeps_its_other_figures_and_needs_force_to_lose_some(
    tmp_path: Path, measured: dict[str, Any]
) -> None:
    path, more = tmp_path / "quick.json", tmp_path / "standard.json"
    path.write_text(json.dumps(measured))
    more.write_text(json.dumps(result("Denoise", LEVELS, suite="standard")))
    missing = invoke("submit", "Denoise", "--result", path, "-o", tmp_path)
    assert missing.exit_code == 1 and "who made the defence: give --authors" in missing.output
    said = [f"--{key.replace('_', '-')}={value}" for key, value in ABOUT.items()]
    assert invoke("submit", "Denoise", "--result", path, *said, "-o", tmp_path).exit_code == 0
    assert invoke("submit", "Denoise", "--result", more, "-o", tmp_path).exit_code == 0
    again = invoke("submit", "Denoise", "--result", path, "-o", tmp_path)
    assert again.exit_code == 1 and "procedural, quick already; --force replaces them" in again.output
    forced = invoke("submit", "Denoise", "--result", path, "-o", tmp_path, "--force", "--venue=CVPR 2027")
    assert forced.exit_code == 0
    card = cards.load_card(tmp_path / "denoise.json")
    assert sorted(each["suite"] for each in card["results"]) == ["quick", "standard"]
    assert (card["venue"], card["authors"]) == ("CVPR 2027", "A. Author")
    unknown = cards.load_result(path)
    with pytest.raises(ValueError, match=r"no figures of 'mesh', but of: none, sor, sor-smooth, Denoise"):
        cards.trimmed(unknown, "mesh")


def test_the_schema_refuses_what_is_wrong(measured: dict[str, Any]) -> None:
    good = cards.make([measured], "Denoise", ABOUT)
    jsonschema.validate(good, cards.schema())

    def broken(change: Any) -> None:
        card = copy.deepcopy(good)
        change(card)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(card, cards.schema())

    broken(lambda card: card.pop("measured_by"))
    broken(lambda card: card.update(link="javascript:alert(1)"))
    broken(lambda card: card.update(results=[]))
    broken(lambda card: card.update(website="https://example.org"))
    broken(lambda card: card["results"][0]["figures"][0]["worst"].update(accuracy=101))
    broken(lambda card: card["results"][0]["cells"][0].update(right=["1"]))
    broken(lambda card: card["results"][0]["victims"]["pointnet-procedural"].update(weights="x"))


def test_the_page_needs_nothing_but_itself(measured: dict[str, Any], tmp_path: Path) -> None:
    hostile = copy.deepcopy(measured)
    hostile["flags"][0]["says"] = '</script><script>alert("x")</script>'
    text = report.page(report.leaderboard([hostile]))
    assert text.count("</script>") == 2
    assert "{{" not in text
    assert "default-src 'none'; script-src 'sha256-" in text
    assert not re.search(r"""(src|href)\s*=\s*["']|url\(|@import|fetch\(""", text)
    report.write_page(measured, tmp_path / "page.html")
    assert "Denoise under attack" in (tmp_path / "page.html").read_text()


def test_the_denoiser_of_the_guide_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(cards.__file__).parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    block, *_ = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    given: dict[str, Any] = {}

    class Stub:
        worst = static = adaptive = 0.0
        flags: tuple[str, ...] = ()

        def to_html(self, path: str) -> None:
            given["page"] = path

    def evaluate(**options: Any) -> Stub:
        given.update(options)
        return Stub()

    monkeypatch.setattr(benchmarks, "evaluate", evaluate, raising=False)
    exec(block, {"__name__": "__main__"})
    points = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    before = points.clone()
    moved = given["defence"](points)
    assert moved.shape == points.shape and (points == before).all()
    nearest = (points[0] - points[0, 5]).norm(dim=1).argsort()[:8]
    torch.testing.assert_close(moved[0, 5], points[0, nearest].mean(0))
    assert (given["suite"], given["page"]) == ("quick", "page.html")


def test_a_model_with_its_defence_is_listed_by_its_name(tmp_path: Path) -> None:
    made = result("none", {"none": 50}, victims=("robust-net",))
    made["name"] = "robust-net"
    board = report.leaderboard([made])
    assert {row["defence"] for row in board["rows"]} == {"robust-net"}
    assert {cell["defence"] for cell in board["cells"]} == {"robust-net"}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(made))
    said = [f"--{key.replace('_', '-')}={value}" for key, value in ABOUT.items()]
    assert invoke("submit", "robust-net", "--result", path, *said, "-o", tmp_path).exit_code == 0
    assert cards.load_card(tmp_path / "robust-net.json")["name"] == "robust-net"


def test_the_guide_explains_every_flag() -> None:
    guide = (Path(cards.__file__).parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")
    assert re.findall(
        r"^\| `([a-z-]+)` \| ", guide.partition("## Flags")[2].partition("## What")[0], re.M
    ) == [*FLAGS]


def test_what_is_measured_becomes_a_page_and_a_card(tmp_path: Path) -> None:
    found = evaluate(
        defence=grid_parts.halved,
        victim=grid_parts.Length(),
        data=grid_parts.clouds(4),
        suite=grid_parts.small(clouds=4),
    )
    found.to_html(tmp_path / "page.html")
    assert "halved under attack" in (tmp_path / "page.html").read_text()
    found.to_json(tmp_path / "result.json")
    made = cards.load_result(tmp_path / "result.json") | {"command": "evaluate(defence=halved)"}
    for row in ("halved", "sor-smooth"):
        card = cards.load_card(submit.write(made, row, ABOUT, tmp_path))
        jsonschema.validate(card, cards.schema())
    board = report.leaderboard([made])
    (row,) = {r["victim"] for r in board["rows"]}
    ours = row_of(board, "halved", row)
    assert ours["worst"]["accuracy"] == pytest.approx(found.worst)
    # The same difference as the one that the run itself states.
    stated = [each for each in made["differences"] if each["against"] == "sor-smooth"]
    assert [ours["difference"][key] for key in ("difference", "low", "high")] == [
        pytest.approx(stated[0][key]) for key in ("difference", "low", "high")
    ]


def test_submit_measures_with_the_options_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    class Stub:
        failures: tuple[str, ...] = ()
        data = result("Denoise", LEVELS, victims=("pointnet-procedural",))

    del Stub.data["command"]

    def stub(**options: Any) -> Stub:
        given.update(options)
        return Stub()

    monkeypatch.setattr(benchmarks, "evaluate", stub)
    said = [f"--{key.replace('_', '-')}={value}" for key, value in ABOUT.items()]
    options = ("--suite=standard", "--data=modelnet40", f"--store={tmp_path / 'store'}", "-o", tmp_path)
    # What a card needs is asked for before the measurement.
    assert invoke("submit", "mine.py:Denoise", *options).exit_code == 1
    assert not given
    assert invoke("submit", "mine.py:Denoise", *said, *options).exit_code == 0
    assert (given["defence"], given["suite"], given["data"]) == ("mine.py:Denoise", "standard", "modelnet40")
    assert given["store"] == tmp_path / "store"
    card = cards.load_card(tmp_path / "denoise.json")
    jsonschema.validate(card, cards.schema())
    command = "ifdefense-bench run --defence mine.py:Denoise --suite standard --data modelnet40"
    assert card["results"][0]["command"] == command


@pytest.mark.parametrize("command", [["submit", "sor"], ["run", "--defence", "sor"]])
@pytest.mark.parametrize(("error", "code"), [(ConnectionError, 2), (ImportError, 2), (StoreError, 1)])
def test_commands_that_measure_end_with_the_same_codes(
    command: list[str], error: type[Exception], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import benchmarks.run

    def stub(**options: Any) -> None:
        raise error("no such luck")

    monkeypatch.setattr(benchmarks, "evaluate", stub)
    monkeypatch.setattr(benchmarks.run, "evaluate", stub)
    said = [f"--{key.replace('_', '-')}={value}" for key, value in ABOUT.items()]
    outcome = invoke(*command, *(said if command[0] == "submit" else ()), f"--store={tmp_path}")
    assert outcome.exit_code == code and outcome.output.splitlines()[-1] == "Error: no such luck"


def test_submit_refuses_the_result_of_another_defence(tmp_path: Path, measured: dict[str, Any]) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(measured))
    said = [f"--{key.replace('_', '-')}={value}" for key, value in ABOUT.items()]
    outcome = invoke("submit", "own.py:Drop", "--result", path, *said, "-o", tmp_path / "cards")
    assert outcome.exit_code == 1
    assert "the result measured 'Denoise', not 'own.py:Drop'" in outcome.output
    assert not (tmp_path / "cards").exists()
