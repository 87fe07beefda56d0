"""``ifdefense train onet``: shapes → occupancies → Occupancy Network → safetensors with a model card."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import sys
from pathlib import Path
from typing import Any

import click
import torch

from ifdefense.checkpoints import load_into, load_state, save_safetensors
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.training.collections import cached, from_meshes, from_modelnet40, from_procedural
from ifdefense.training.fit import TrainOptions, fit
from ifdefense.training.occupancies import OFFSET, OccupancySet, concatenate
from ifdefense.training.surfaces import chamfer_l1

SOURCES = ("modelnet40", "meshes", "procedural")


def _mix(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    mix = {}
    for value in values:
        name, _, weight = value.partition("=")
        if name not in SOURCES:
            raise click.BadParameter(f"{name!r} is none of {', '.join(SOURCES)}")
        try:
            mix[name] = float(weight or 1)
        except ValueError:
            raise click.BadParameter(f"{weight!r} is no number") from None
    return mix


def _collect(name: str, root: str | None, cache: Path, per_class: int, seed: int) -> OccupancySet:
    if name == "modelnet40":
        return cached(cache / "modelnet40-train", lambda: from_modelnet40(root, "train"))
    if name == "meshes":
        return cached(cache / "meshes", lambda: from_meshes(root, seed))
    return cached(cache / "procedural", lambda: from_procedural(per_class, seed + 1))


@click.command("onet")
@click.option(
    "--mix", multiple=True, callback=_mix, help="NAME=WEIGHT of a source: modelnet40, meshes or procedural."
)
@click.option("--data", "root", type=click.Path(), help="Data folder; IFDEFENSE_DATA by default.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/occupancy"), show_default=True)
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/onet"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the weights (.safetensors).")
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="Weights to start from.")
@click.option("--steps", default=TrainOptions.steps, show_default=True)
@click.option("--batch", default=TrainOptions.batch, show_default=True)
@click.option("--queries", default=TrainOptions.queries, show_default=True)
@click.option("--rate", default=TrainOptions.rate, show_default=True, help="Learning rate of Muon.")
@click.option(
    "--weight-decay", default=TrainOptions.weight_decay, show_default=True, help="Of Muon's matrices."
)
@click.option("--rest", default=TrainOptions.rest, show_default=True, help="Learning rate of Adam.")
@click.option(
    "--decay", default=TrainOptions.decay, show_default=True, help="Share of the steps with a falling rate."
)
@click.option(
    "--widths", nargs=3, type=int, default=(128, 256, 128), show_default=True, help="Encoder, code, decoder."
)
@click.option(
    "--frequencies", default=5, show_default=True, help="Octaves of the positional encoding, 0 for none."
)
@click.option("--per-class", default=100, show_default=True, help="Procedural shapes a class.")
@click.option("--every", default=250, show_default=True, help="Steps between validations.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def train_command(
    mix: dict[str, float],
    root: str | None,
    cache: Path,
    run: Path,
    out: Path | None,
    init: Path | None,
    widths: tuple[int, int, int],
    frequencies: int,
    per_class: int,
    every: int,
    device: str,
    **settings: Any,
) -> None:
    """Trains an Occupancy Network; an interrupted run goes on where it stopped.

    Validation shapes are ModelNet40 clouds held out of its train shards, or procedural shapes where the mix
    has no ModelNet40.
    """
    logging.basicConfig(level=logging.INFO)
    mix = mix or {"procedural": 1.0}
    options = TrainOptions(config=OccupancyConfig(*widths, frequencies), **settings)
    parts = {name: _collect(name, root, cache, per_class, options.seed) for name in mix}
    data = concatenate([dataclasses.replace(part, sources=(name,)) for name, part in parts.items()])
    if "modelnet40" in mix:
        held = cached(cache / "modelnet40-validation", lambda: from_modelnet40(root, "validation"))
    else:
        held = cached(cache / "procedural-validation", lambda: from_procedural(4, options.seed + 2))
    network = fit(data, held, run, options, mix=mix, device=device, every=every, init=init)
    distance = chamfer_l1(network, held, options)
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": options.steps, "chamfer_l1": distance}) + "\n")
    click.echo(
        f"validation Chamfer-L1: {distance['clean']:.3f} (clean), {distance['corrupted']:.3f} (corrupted)"
    )
    if out is not None:
        save_safetensors(
            network, out, {"offset": str(OFFSET), "options": json.dumps(dataclasses.asdict(options))}
        )
        _write_card(out, run, mix, options, len(data), distance)


def _write_card(
    out: Path,
    run: Path,
    mix: dict[str, float],
    options: TrainOptions,
    shapes: int,
    distance: dict[str, float],
) -> None:
    best = torch.load(run / "best.pt", weights_only=True)
    network = OccupancyNetwork(options.config)
    load_into(network, load_state(out), out)
    count = sum(parameter.numel() for parameter in network.parameters())
    config = options.config
    words = sys.argv[1:] if sys.argv[1:3] == ["train", "onet"] else ["train", "onet", *sys.argv[1:]]
    sources = ", ".join(f"{name} (weight {weight:g})" for name, weight in mix.items())
    scores = ", ".join(f"{score:.3f} ({name} input)" for name, score in best["iou"].items())
    lines = [
        f"# {out.stem}",
        "",
        "Occupancy Network conditioned on point clouds (Mescheder et al., CVPR 2019), trained here.",
        "",
        f"- command: `ifdefense {' '.join(words)}`",
        f"- data: {sources}; {shapes} shapes",
        f"- widths: encoder {config.encoder}, code {config.code}, decoder {config.decoder};"
        f" {config.frequencies} octaves; {count:,} parameters, float16",
        f"- steps: {best['step']} of {options.steps}; batch {options.batch} × {options.queries} queries",
        f"- seed: {options.seed}; date: {datetime.date.today()}; torch {torch.__version__}",
        f"- validation IoU: {scores}",
        f"- validation Chamfer-L1, tenths of the longest side: {distance['clean']:.3f} (clean input), "
        f"{distance['corrupted']:.3f} (corrupted input); no surface for {distance['missing']:.0%}",
        f"- frame: unit cube; label: inside the solid thickened by {OFFSET}; threshold {options.threshold}",
        "",
    ]
    out.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    train_command()
