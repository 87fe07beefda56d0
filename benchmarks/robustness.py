"""``ifdefense-bench robustness``: every attack of the suite against every defence, plain and adaptive.

The protocol is that of `benchmarks.accuracy`: test clouds drawn in proportion to the classes, fixed random
targets, attacked clouds not normalised again. "Plain" attacks know the classifier and not the defence;
"adaptive" ones see both, through `attacks.adaptive`, and are made anew for every defence.

Every attacked and purified batch is kept in a cache: an interrupted run goes on where it was, and a row that
is there already costs nothing.
"""

from __future__ import annotations

import functools
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
from torch import Tensor, nn

from attacks import EOT, Attack, adaptive, attack_in_batches
from benchmarks import record
from benchmarks.accuracy import DEFENCES, Bench, Settings, load_victim, predictions
from benchmarks.suite import SUITE, names
from classifiers import fold
from ifdefense import Purifier

SEED = 0


def through(attack: Attack, defence: str, num_points: int) -> Attack:
    """The attack as one makes it who knows the defence.

    The attacker knows the seed of the defence too, which is harder on it than an average over seeds.
    """
    purifier = Purifier.from_pretrained(defence)
    return adaptive(
        attack,
        functools.partial(purifier, num_points=num_points),
        eot=EOT(samples=1, first=SEED, fresh=False),
        normalise=defence == "onet-mesh",
        seed=SEED,
    )


def _percentages(hits: Tensor) -> dict[str, float]:
    rate = float(hits.double().mean())
    return {
        "accuracy": round(100 * rate, 2),
        "standard_error": round(100 * math.sqrt(rate * (1 - rate) / len(hits)), 2),
    }


def measure(
    bench: Bench,
    victim: nn.Module,
    name: str,
    defences: tuple[str, ...],
    kind: Literal["plain", "adaptive"],
    published: bool,
) -> dict[str, Any]:
    """Accuracy behind each defence under one attack, and the attack's own success on what it attacked.

    Args:
        bench: clouds, targets and cache.
        victim: the classifier.
        name: attack of the suite, or ``"none"``.
        defences: names of defences.
        kind: whether the attacks know the defence.
        published: whether the attack has its published settings.
    """
    right: dict[str, Any] = {}
    given = {"none": bench.points}
    if name != "none":
        entry = SUITE[name]
        plain = entry.attack(published)
        for defence in defences if kind == "adaptive" else ("none",):
            attack = plain if defence == "none" else through(plain, defence, bench.points.shape[1])
            result = attack_in_batches(
                attack,
                victim,
                bench.points,
                bench.labels,
                bench.targets if entry.targeted else None,
                batch_size=bench.batch,
                folder=bench.cache / "suite" / name,
                seed=bench.settings.seed,
                progress=True,
            )
            given[defence] = result.points
            right[f"success on {defence}"] = round(100 * float(result.success.double().mean()), 2)
    for defence in defences:
        attacked = given.get(defence, given["none"])
        seen = bench.defended(attacked, defence, f"{name} → {defence}")["points"]
        right[defence] = _percentages(predictions(victim, seen, bench.batch) == bench.labels)
    return right


@click.command()
@click.option("--victim", "victims", multiple=True, default=("pointnet-modelnet40",), show_default=True)
@click.option(
    "--attack",
    "chosen",
    multiple=True,
    type=click.Choice(["none", *SUITE]),
    help="May be given several times; all by default.",
)
@click.option("--defence", "defences", multiple=True, type=click.Choice(DEFENCES), default=DEFENCES)
@click.option("--adaptive/--plain", "knows", default=False, help="Whether the attacks know the defence.")
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("--clouds", default=400, show_default=True, help="Drawn in proportion to the classes.")
@click.option("--published", is_flag=True, help="Published settings, for hours of a GPU.")
@click.option("--batch", default=25, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/accuracy"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=record.FOLDER / "robustness.json")
def robustness(
    victims: tuple[str, ...],
    chosen: tuple[str, ...],
    defences: tuple[str, ...],
    knows: bool,
    split: Literal["test", "validation"],
    clouds: int,
    published: bool,
    batch: int,
    cache: Path,
    out: Path,
) -> None:
    """Every attack against every defence on ModelNet40 (needs IFDEFENSE_DATA).

    Rows are added to the JSON one by one; a row of the same victim, attack and kind replaces the older one.
    """
    bench = Bench(Settings(split, clouds, SEED), cache, batch)
    kind: Literal["plain", "adaptive"] = "adaptive" if knows else "plain"
    every = tuple(name for name in names() if SUITE[name].adaptive) if knows else ("none", *names())
    for victim_name in victims:
        victim = fold(load_victim(victim_name))
        for name in chosen or every:
            figures = measure(bench, victim, name, defences, kind, published)
            row = {
                "victim": Path(victim_name).stem,
                "attack": name,
                "kind": kind,
                "settings": None if name == "none" else str(SUITE[name].attack(published)),
                "split": split,
                "clouds": clouds,
                "seed": SEED,
                "date": datetime.now(UTC).date().isoformat(),
                "figures": figures,
            }
            rows = [] if not out.is_file() else json.loads(out.read_text(encoding="utf-8"))["rows"]
            key = ("victim", "attack", "kind")
            rows = [old for old in rows if any(old[part] != row[part] for part in key)]
            result = {"command": "ifdefense-bench robustness", "machine": record.machine()}
            record.write(out, {**result, "rows": [*rows, row]})
            shown = ", ".join(f"{defence} {figures[defence]['accuracy']:.1f}" for defence in defences)
            click.echo(f"{row['victim']}, {kind} {name}: {shown}")


def markdown_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: one line a victim, attack and kind."""
    header = ["victim", "attack", "clouds", *DEFENCES]
    order = {name: place for place, name in enumerate(("none", *SUITE))}
    lines = []
    for row in sorted(
        result["rows"], key=lambda row: (row["victim"], row["kind"] != "plain", order[row["attack"]])
    ):
        title = "clean" if row["attack"] == "none" else SUITE[row["attack"]].title
        title += " (adaptive)" if row["kind"] == "adaptive" else ""
        cells = [
            f"{row['figures'][defence]['accuracy']:.1f}" if defence in row["figures"] else "–"
            for defence in DEFENCES
        ]
        lines.append([row["victim"], title, str(row["clouds"]), *cells])
    return header, lines
