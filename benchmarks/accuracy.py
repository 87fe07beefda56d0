"""Accuracy of PointNet on ModelNet40 under attack, with and without defences, beside the published figures.

The protocol is IF-Defense's (`arXiv:2010.05272 <https://arxiv.org/abs/2010.05272>`_): clouds are mean-centred
with largest norm 1, targets are fixed random labels, an attacked cloud is not normalised again before it is
classified. The attacker knows the victim but not the defence ("grey box"). What a surface is sampled into is
normalised, as the clouds were that the victim has learnt from.

Attacked and purified clouds are cached batch by batch, so an interrupted run goes on where it was; a cache is
only used while the victim, the settings and, for purified clouds, the sources of the defence are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

import classifiers
import ifdefense
from attacks import PGD, Attack, Perturb, SaliencyDrop, random_targets
from benchmarks import published, record
from benchmarks.tables import markdown
from ifdefense.data.cloudset import CloudSet
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.geometry.frame import to_unit_sphere

logger = logging.getLogger(__name__)

ATTACKS = ("none", "perturb", "pgd", "pgd-untargeted", "drop-100", "drop-200")
TITLES = {
    "none": "clean",
    "perturb": "Perturb",
    "pgd": "PGD",
    "pgd-untargeted": "PGD untargeted",
    "drop-100": "Drop-100",
    "drop-200": "Drop-200",
}
TARGETED = ("perturb", "pgd")
DEFENCES = ("none", "srs", "sor", "onet-mesh")
ROWS = (
    "pointnet-modelnet40:none",
    "pointnet-modelnet40:srs",
    "pointnet-modelnet40:sor",
    "pointnet-modelnet40:onet-mesh",
    "pointnet-modelnet40-hybrid:none",
    "pointnet-modelnet40-hybrid:onet-mesh",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the figures depend on beside victim and defence.

    Attributes:
        split: of ModelNet40; choices are made on validation.
        clouds: how many are drawn, in proportion to the classes.
        seed: of the draw, the targets, the attacks and the defences.
        cw_searches: bisection steps of Perturb (published: 10).
        cw_iterations: Adam steps a bisection step of Perturb (published: 500).
    """

    split: Literal["validation", "test"] = "test"
    clouds: int = 400
    seed: int = 0
    cw_searches: int = 3
    cw_iterations: int = 80

    def attack(self, name: str) -> Attack:
        """An attack by name."""
        if name == "perturb":
            return Perturb(searches=self.cw_searches, iterations=self.cw_iterations)
        if name.startswith("pgd"):
            return PGD()
        return SaliencyDrop(int(name.removeprefix("drop-")))


def draw(labels: NDArray[np.integer], count: int, seed: int) -> NDArray[np.int64]:
    """Ascending indices of ``count`` random examples, classes in proportion by largest remainders.

    Args:
        labels: ``(S,)`` classes.
        count: examples to draw.
        seed: of the draw.

    Raises:
        ValueError: if there are fewer examples than that.
    """
    if not 0 < count <= len(labels):
        raise ValueError(f"cannot draw {count} of {len(labels)} clouds")
    classes, sizes = np.unique(labels, return_counts=True)
    share = sizes * count / len(labels)
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: count - take.sum()]] += 1
    rng = np.random.default_rng(seed)
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def digest(*parts: object) -> str:
    """Short name of a cache that depends on these parts.

    Tensors and modules count by their values, a path by its contents, anything else by its ``repr``.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            for name, value in sorted(part.state_dict().items()):
                total.update(name.encode() + value.detach().cpu().numpy().tobytes())
        elif isinstance(part, Tensor):
            total.update(part.numpy().tobytes())
        elif isinstance(part, Path):
            total.update(part.read_bytes())
        else:
            total.update(repr(part).encode())
    return total.hexdigest()[:12]


@dataclasses.dataclass(eq=False)
class Bench:
    """The clouds of a run, and the cache of what attacks and defences make of them.

    Attributes:
        settings: of the run.
        cache: folder of the cache.
        batch: clouds at a time; results do not depend on it.
    """

    settings: Settings
    cache: Path
    batch: int = 25
    chosen: CloudSet = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        whole = load_modelnet40(split=self.settings.split)
        index = draw(whole.labels, self.settings.clouds, self.settings.seed)
        self.chosen = whole[index]
        self.points = to_unit_sphere(torch.from_numpy(self.chosen.points))
        self.labels = torch.from_numpy(self.chosen.labels)
        # The targets of the whole split are drawn at once: they do not depend on which clouds are chosen.
        targets = random_targets(torch.from_numpy(whole.labels), len(whole.classes), self.settings.seed)
        self.targets = targets[torch.from_numpy(index)]

    def _cached(
        self, folder: Path, title: str, make: Callable[[slice], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors of all clouds, made batch by batch unless the folder has them."""
        parts: list[dict[str, Tensor]] = []
        folder.mkdir(parents=True, exist_ok=True)
        for start in tqdm(range(0, len(self.labels), self.batch), title, unit="batch", mininterval=5):
            path = folder / f"{start:05d}-{self.batch}.npz"
            if not path.is_file():
                began = time.perf_counter()
                rows = slice(start, start + self.batch)
                made = {name: value.numpy() for name, value in make(rows).items()}
                count = len(self.labels[rows])
                made["seconds"] = np.full(count, (time.perf_counter() - began) / count, np.float32)
                with path.with_suffix(".partial").open("wb") as file:
                    np.savez(file, **made)  # type: ignore[arg-type]
                path.with_suffix(".partial").replace(path)
            with np.load(path) as arrays:
                parts.append({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def attacked(self, victim: nn.Module, name: str) -> dict[str, Tensor]:
        """Clouds under an attack.

        ``points`` ``(S, M, 3)``, ``seconds`` of each, ``success`` (was the goal reached), and distances.
        """
        if name == "none":
            return {"points": self.points, "seconds": torch.zeros(len(self.labels))}
        attack = self.settings.attack(name)

        def make(rows: slice) -> dict[str, Tensor]:
            targets = self.targets[rows] if name in TARGETED else None
            generator = torch.Generator().manual_seed(self.settings.seed)
            result = attack(victim, self.points[rows], self.labels[rows], targets, generator=generator)
            sizes = {f"distance {size}": value for size, value in result.distances.items()}
            return {"points": result.points, "success": result.success, **sizes}

        goal = self.targets if name in TARGETED else self.labels
        key = digest(victim, attack, self.points, goal, self.settings.seed)
        return self._cached(self.cache / "attacked" / f"{name}-{key}", name, make)

    def defended(self, attacked: Tensor, defence: str, title: str) -> dict[str, Tensor]:
        """``points`` as the victim sees them behind a defence, and ``seconds`` of each."""
        if defence == "none":
            return {"points": attacked, "seconds": torch.zeros(len(attacked))}
        purifier = ifdefense.Purifier.from_pretrained(defence)
        sources = sorted(Path(ifdefense.__file__).parent.glob("*.py"))

        def make(rows: slice) -> dict[str, Tensor]:
            points = purifier(attacked[rows], self.points.shape[1], self.settings.seed)
            return {"points": to_unit_sphere(points) if defence == "onet-mesh" else points}

        key = digest(purifier, purifier.options, attacked, self.settings.seed, *sources)
        return self._cached(self.cache / "purified" / f"{defence}-{key}", title, make)


@torch.no_grad()
def predictions(victim: nn.Module, points: Tensor, batch: int) -> Tensor:
    """``(S,)`` predicted classes of ``(S, N, 3)`` clouds."""
    return torch.cat([victim(part).argmax(1) for part in torch.split(points, batch)])


def load_victim(name: str) -> nn.Module:
    """A shipped classifier by its name, or another as ``NETWORK:FILE``."""
    network, colon, path = name.partition(":")
    return classifiers.load(network, path) if colon else classifiers.load(name)


def victim_title(name: str) -> str:
    """What stands in a table for a victim: its shipped name, or that of its network and its file."""
    network, colon, path = name.partition(":")
    return f"{network}-{Path(path).stem}" if colon else name


def measure(bench: Bench, victim: nn.Module, defence: str, attacks: Iterable[str]) -> dict[str, Any]:
    """One row: for each attack the accuracy in %, its standard error, and seconds a cloud."""
    row: dict[str, Any] = {}
    for name in attacks:
        attacked = bench.attacked(victim, name)
        seen = bench.defended(attacked["points"], defence, f"{name} → {defence}")
        right = (predictions(victim, seen["points"], bench.batch) == bench.labels).double()
        rate = float(right.mean())
        row[name] = {
            "accuracy": round(100 * rate, 2),
            "standard_error": round(100 * math.sqrt(rate * (1 - rate) / len(right)), 2),
            "attack_seconds": round(float(attacked["seconds"].mean()), 3),
            "defence_seconds": round(float(seen["seconds"].mean()), 3),
        }
        if "success" in attacked:
            row[name]["attack_success"] = round(100 * float(attacked["success"].double().mean()), 2)
        if "distance l2" in attacked:
            row[name]["l2"] = round(float(attacked["distance l2"].median()), 3)
        logger.info("%s under %s: %s", defence, name, row[name])
    return row


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown, with the published figures, where there are any, in brackets."""
    attacks = result["attacks"]
    lines = []
    for row in result["rows"]:
        cells = []
        for name in attacks:
            mark = published.accuracy(row["victim"], row["defence"], name)
            cells.append(
                f"{row['figures'][name]['accuracy']:.1f}" + ("" if mark is None else f" ({mark:.1f})")
            )
        lines.append([f"{row['defence']}, {row['victim']}", *cells])
    return markdown(["defence, victim", *(TITLES[name] for name in attacks)], lines)


def describe(bench: Bench, attacks: Iterable[str]) -> dict[str, Any]:
    """Everything that is needed to measure the same again."""
    settings = bench.settings
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "settings": dataclasses.asdict(settings),
        "attacks": {name: None if name == "none" else str(settings.attack(name)) for name in attacks},
        "published": "IF-Defense, arXiv:2010.05272, table 2: 2,468 clouds, Perturb of 10 x 500 iterations",
        "machine": record.machine(),
        "names": bench.chosen.names.tolist(),
        "targets": bench.targets.tolist(),
    }


@click.command()
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option(
    "--clouds", default=Settings.clouds, show_default=True, help="Drawn in proportion to the classes."
)
@click.option("--seed", default=Settings.seed, show_default=True)
@click.option("--cw-searches", default=Settings.cw_searches, show_default=True, help="Published: 10.")
@click.option("--cw-iterations", default=Settings.cw_iterations, show_default=True, help="Published: 500.")
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    type=click.Choice(ATTACKS),
    default=("none", "perturb", "pgd", "drop-100", "drop-200"),
    show_default=True,
    help="May be given several times.",
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    default=ROWS,
    show_default=True,
    help="VICTIM:DEFENCE, the victim a shipped name or NETWORK:FILE; may be given several times.",
)
@click.option("--batch", default=25, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/accuracy"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON; by default in benchmarks/results.")
def accuracy(
    split: Literal["test", "validation"],
    clouds: int,
    seed: int,
    cw_searches: int,
    cw_iterations: int,
    attacks: tuple[str, ...],
    rows: tuple[str, ...],
    batch: int,
    cache: Path,
    out: Path | None,
) -> None:
    """Accuracy on ModelNet40 under attack, with and without defences (needs IFDEFENSE_DATA).

    Goes on where an interrupted run was. The JSON is written after every row.
    """
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    pairs = [_pair(row) for row in rows]
    bench = Bench(Settings(split, clouds, seed, cw_searches, cw_iterations), cache, batch)
    out = out or record.FOLDER / ("accuracy.json" if split == "test" else "accuracy_validation.json")
    command = click.get_current_context().command_path
    result = {
        "command": command,
        "arguments": {"rows": rows, "batch": batch},
        **describe(bench, attacks),
        "rows": [],
    }
    for victim, defence in pairs:
        figures = measure(bench, load_victim(victim), defence, attacks)
        result["rows"].append({"victim": victim_title(victim), "defence": defence, "figures": figures})
        record.write(out, json.loads(json.dumps(result)))
        click.echo(table(result) + "\n")


def _pair(row: str) -> tuple[str, str]:
    victim, colon, defence = row.rpartition(":")
    if not colon or defence not in DEFENCES:
        raise click.BadParameter(f"{row!r} is no VICTIM:DEFENCE; defences are {', '.join(DEFENCES)}")
    return victim, defence
