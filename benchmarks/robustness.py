"""``ifdefense-bench robustness``: every attack of the suite against every defence, plain and adaptive.

The protocol is that of `benchmarks.accuracy`: test clouds drawn in proportion to the classes, fixed random
targets, attacked clouds not normalised again. "Plain" attacks know the classifier and not the defence;
"adaptive" ones see both, through `attacks.defence_aware.adaptive`, and are made anew for every defence.

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
from benchmarks.accuracy import DEFENCES, Bench, Settings, load_victim, predictions, victim_title
from benchmarks.published import accuracy as published_accuracy
from benchmarks.suite import SUITE, names, slow
from classifiers import fold
from ifdefense import Purifier

SEED = 0
WHOLE = 400
VICTIMS = ("pointnet-modelnet40", "dgcnn-modelnet40")


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


def _figures(predicted: Tensor, bench: Bench, targeted: bool) -> dict[str, float]:
    """Accuracy and the attack's success in %, and the standard error of the accuracy."""
    rate = float((predicted == bench.labels).double().mean())
    success = float((predicted == bench.targets).double().mean()) if targeted else 1 - rate
    return {
        "accuracy": round(100 * rate, 2),
        "standard_error": round(100 * math.sqrt(rate * (1 - rate) / len(predicted)), 2),
        "success": round(100 * success, 2),
    }


def measure(
    bench: Bench,
    victim: nn.Module,
    name: str,
    defences: tuple[str, ...],
    knows: bool,
    published: bool,
) -> dict[str, dict[str, float]]:
    """Accuracy and success behind each defence under one attack.

    Args:
        bench: clouds, targets and cache.
        victim: the classifier.
        name: attack of the suite, or ``"none"``.
        defences: names of defences.
        knows: whether the attack is made anew for each defence, knowing it.
        published: whether the attack has its published settings.
    """
    entry = SUITE.get(name)
    given = {"none": bench.points}
    if entry is not None:
        plain = entry.attack(published, slow(victim))
        for defence in defences if knows else ("none",):
            attack = plain if defence == "none" else through(plain, defence, bench.points.shape[1])
            given[defence] = attack_in_batches(
                attack,
                victim,
                bench.points,
                bench.labels,
                bench.targets if entry.targeted else None,
                batch_size=bench.batch,
                folder=bench.cache / "suite" / name,
                seed=bench.settings.seed,
                progress=True,
            ).points
    figures = {}
    for defence in defences:
        attacked = given.get(defence, given["none"])
        seen = bench.defended(attacked, defence, f"{name} → {defence}")["points"]
        predicted = predictions(victim, seen, bench.batch)
        figures[defence] = _figures(predicted, bench, entry is not None and entry.targeted)
    return figures


@click.command()
@click.option(
    "--victim",
    "victims",
    multiple=True,
    default=VICTIMS,
    show_default=True,
    help="A shipped name or NETWORK:FILE; may be given several times.",
)
@click.option(
    "--attack",
    "chosen",
    multiple=True,
    type=click.Choice(["none", *SUITE]),
    help="May be given several times; all by default.",
)
@click.option("--defence", "defences", multiple=True, type=click.Choice(DEFENCES), default=DEFENCES)
@click.option(
    "--adaptive/--plain",
    "knows",
    default=None,
    help="Only attacks that know the defence, or only those that do not; by default both.",
)
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option(
    "--clouds",
    type=click.IntRange(min=1),
    help="Drawn in proportion to the classes; by default as many as the suite says for each attack.",
)
@click.option("--published", is_flag=True, help="Published settings on 400 clouds, for hours of a GPU.")
@click.option("--batch", default=25, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/accuracy"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=record.FOLDER / "robustness.json")
def robustness(
    victims: tuple[str, ...],
    chosen: tuple[str, ...],
    defences: tuple[str, ...],
    knows: bool | None,
    split: Literal["test", "validation"],
    clouds: int | None,
    published: bool,
    batch: int,
    cache: Path,
    out: Path,
) -> None:
    """Every attack against every defence on ModelNet40 (needs IFDEFENSE_DATA).

    Rows are added to the JSON one by one; a row of the same victim, attack and kind replaces the older one,
    but keeps its figures of defences that are not asked for where clouds and settings are the same.
    """
    bench_of = functools.cache(lambda number: Bench(Settings(split, number, SEED), cache, batch))
    for knowing in (False, True) if knows is None else (knows,):
        usual = [name for name in names() if SUITE[name].adaptive] if knowing else ["none", *names()]
        for victim_name in victims:
            victim = fold(load_victim(victim_name))
            for name in chosen or usual:
                number = clouds or affordable(name, victim, knowing, published)
                row = {
                    "victim": victim_title(victim_name),
                    **run(bench_of(number), victim, name, defences, knowing, published),
                }
                _add(out, row)
                shown = ", ".join(f"{one} {row['figures'][one]['accuracy']:.1f}" for one in defences)
                click.echo(f"{row['victim']}, {row['kind']} {name}, {number} clouds: {shown}")


def affordable(name: str, victim: nn.Module, knows: bool, published: bool) -> int:
    """How many clouds a row has where nothing else is said."""
    if name == "none" or published:
        return WHOLE
    return SUITE[name].affordable_clouds(victim, knows)


def run(
    bench: Bench, victim: nn.Module, name: str, defences: tuple[str, ...], knows: bool, published: bool
) -> dict[str, Any]:
    """A row of the results, as `measure` takes them; an adaptive one has the plain figures beside its own."""
    row = {
        "attack": name,
        "kind": "adaptive" if knows else "plain",
        "settings": None if name == "none" else SUITE[name].settings(published, slow(victim)),
        "split": bench.settings.split,
        "clouds": bench.settings.clouds,
        "seed": bench.settings.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "figures": measure(bench, victim, name, defences, knows, published),
    }
    if knows:
        row["plain"] = measure(bench, victim, name, defences, False, published)
    return row


def _add(out: Path, row: dict[str, Any]) -> None:
    """Writes a row into the results, in the place of an older one."""
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.is_file() else []
    others = [old for old in rows if any(old[key] != row[key] for key in ("victim", "attack", "kind"))]
    for old in rows:
        if old not in others and all(old[key] == row[key] for key in ("settings", "split", "clouds", "seed")):
            row |= {part: {**old[part], **row[part]} for part in ("figures", "plain") if part in row}
    result = {"command": "ifdefense-bench robustness", "machine": record.machine()}
    record.write(out, {**result, "rows": [*others, row]})


def markdown_rows(result: dict[str, Any], victim: str, kind: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a victim: one line an attack.

    Args:
        result: the JSON.
        victim: whose rows.
        kind: ``"plain"``, with the published figure in brackets, or ``"adaptive"``, with the accuracy under
            the plain attack on the same clouds.
    """
    order = {name: place for place, name in enumerate(("none", *SUITE))}
    rows = [row for row in result["rows"] if (row["victim"], row["kind"]) == (victim, kind)]
    lines = []
    for row in sorted(rows, key=lambda row: order[row["attack"]]):
        cells = []
        for defence in DEFENCES:
            if defence not in row["figures"]:
                cells.append("–")
                continue
            figure = row["figures"][defence]
            if kind == "adaptive":
                beside = row["plain"][defence]["accuracy"]
            else:
                beside = published_accuracy(victim, defence, row["attack"])
            cells.append(f"{figure['accuracy']:.1f}" + ("" if beside is None else f" ({beside:.1f})"))
        clean = row["attack"] == "none"
        success = "" if clean else f"{row['figures']['none']['success']:.1f}"
        lines.append(["clean" if clean else SUITE[row["attack"]].title, str(row["clouds"]), success, *cells])
    return ["attack", "clouds", "success", *DEFENCES], lines
