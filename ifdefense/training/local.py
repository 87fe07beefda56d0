"""``ifdefense train local``: from surfaces to a local occupancy network with its model card."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from ifdefense.data.modelnet import load_modelnet40
from ifdefense.data.packed import data_folder
from ifdefense.implicit.base import Calibration, load_network
from ifdefense.implicit.local import LocalConfig, LocalOccupancyNetwork
from ifdefense.training.attacked import AttackedClouds
from ifdefense.training.collections import cached_set
from ifdefense.training.commands import mix_of, options_of, prepare, reported, run_options
from ifdefense.training.dense import SAMPLES, DenseSurfaces, from_clouds, from_meshes, from_procedural
from ifdefense.training.fit import TrainOptions, fit
from ifdefense.training.runs import file_digest
from ifdefense.training.surfaces import chamfer_l1
from ifdefense.training.thickened import ThickenedOptions, ThickenedSampler

SOURCES = ("meshes", "furniture", "procedural", "modelnet40")

POINTS = 1024
"""Points that are encoded at most, little more than any example has; larger clouds are subsampled."""

SECOND_THRESHOLD = 0.2
"""Level at which the field is read if there is no surface at 0.5."""

VALIDATED = 96
"""Held-out surfaces whose IoU chooses the weights."""

MEASURED = 64
"""Held-out surfaces whose Chamfer distance goes into the model card."""

DEFAULTS = TrainOptions(
    steps=13000,
    muon_lr=6e-3,
    adam_lr=6e-4,
    weight_decay=0.01,
    adam_decay=0.01,
    adam_beta2=0.99,
    warmup=300,
    cooldown=0.75,
    bfloat16=True,
    ema=0.999,
)


def adam_layers(network: LocalOccupancyNetwork) -> list[nn.Module]:
    """Layers whose matrices Adam trains: the outermost ones and those of positions, whose rank is 3."""
    encoder = network.encoder
    flat = [m for m in network.modules() if isinstance(m, nn.Linear) and m.in_features == 3]
    return [encoder.first, encoder.values, encoder.whole_1, network.decoder.out, *flat]


def collect(
    name: str, root: str | None, cache: Path, per_class: int, teacher: Path | None, limit: int, device: Any
) -> DenseSurfaces:
    """The surfaces of a source, cached in a folder of that name.

    Args:
        name: one of `SOURCES`.
        root: data folder.
        cache: folder of the sets.
        per_class: procedural solids per class.
        teacher: weights that label ModelNet40's training clouds.
        limit: clouds that the teacher tries.
        device: of the teacher.

    Raises:
        DataError: if the data is missing or cannot be used.
        ValueError: if a teacher is needed and not given.
    """
    settings: dict[str, Any] = {"samples": SAMPLES}
    if name == "procedural":
        settings["per_class"] = per_class
        return cached_set(cache / name, lambda: from_procedural(per_class), DenseSurfaces.load, settings)
    settings["folder"] = str(data_folder(root, name).resolve())
    if name != "modelnet40":
        return cached_set(cache / name, lambda: from_meshes(root, name), DenseSurfaces.load, settings)
    if teacher is None:
        raise ValueError("ModelNet40's clouds have no surfaces: they need a teacher")

    def label() -> DenseSurfaces:
        network = load_network(teacher)
        if isinstance(network, nn.Module):
            network.to(device)
        return from_clouds(load_modelnet40(root, "train"), network, limit, device=device)

    settings |= {"teacher": file_digest(teacher), "limit": limit}
    return cached_set(cache / name, label, DenseSurfaces.load, settings)


@click.command("local")
@click.option(
    "--mix",
    multiple=True,
    callback=mix_of(SOURCES, {"procedural": 1.0}),
    help="NAME=WEIGHT of a source: meshes, furniture, procedural or modelnet40.",
)
@run_options("local", "cache/surfaces", DEFAULTS, every=500)
@click.option(
    "--teacher",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights that label ModelNet40's training clouds.",
)
@click.option(
    "--teacher-clouds",
    type=click.IntRange(min=1),
    default=1179,
    show_default=True,
    help="Clouds that the teacher tries, rare classes first.",
)
@click.option(
    "--attacked",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Attacked clouds of the sources, as ifdefense-bench attacked-set writes them.",
)
@click.option(
    "--attacked-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.6,
    show_default=True,
    help="Share of the examples that are attacked clouds, if there are any.",
)
@options_of(ThickenedOptions, batch_size="Clouds per step.", queries="Queries per cloud.")
@options_of(
    DEFAULTS,
    weight_decay="Of all parameters.",
    warmup="Steps of linear warm-up.",
    ema="Decay of the average of the weights.",
)
@click.option(
    "--bfloat16/--float32",
    default=DEFAULTS.bfloat16,
    show_default=True,
    help="Precision of the products in training.",
)
@options_of(
    LocalConfig(),
    width="Features per point.",
    coarse="Features per coarse point; a multiple of 4.",
    values="Size of a point's affine map; a multiple of 6.",
    hidden="Width of the decoder.",
)
@click.option(
    "--per-class",
    type=click.IntRange(min=5),
    default=60,
    show_default=True,
    help="Procedural shapes per class.",
)
@reported()
def train_command(
    mix: dict[str, float],
    root: str | None,
    cache: Path,
    folder: Path,
    out: Path | None,
    force: bool,
    init: Path | None,
    teacher: Path | None,
    teacher_clouds: int,
    attacked: Path | None,
    attacked_share: float,
    batch_size: int,
    queries: int,
    weight_decay: float,
    width: int,
    coarse: int,
    values: int,
    hidden: int,
    per_class: int,
    every: int,
    device: torch.device,
    progress: bool | None,
    **settings: Any,
) -> None:
    """Trains a local occupancy network.

    Validation shapes are held-out meshes, furniture and procedural solids. ModelNet40's clouds have no
    surfaces: --teacher names an earlier network that finds them. A run is resumed only with the options it
    was started with, but for more steps.
    """
    sampling = ThickenedOptions(batch_size=batch_size, queries=queries)
    # The loss is summed over the queries: this clips the gradient of their mean to norm 1.
    options = dataclasses.replace(
        DEFAULTS, weight_decay=weight_decay, adam_decay=weight_decay, max_norm=float(queries), **settings
    )
    config = LocalConfig(width=width, coarse=coarse, values=values, hidden=hidden)
    if ("modelnet40" in mix) != (teacher is not None):
        raise ValueError("--mix modelnet40 and --teacher are given together or not at all")
    if set(mix) == {"modelnet40"}:
        raise ValueError("the mix needs a second source: of modelnet40 no surface is held out for validation")
    prepare(out, force, folder)
    calibration = Calibration(sampling.box, options.threshold, SECOND_THRESHOLD, sampling.offset, POINTS)
    torch.manual_seed(options.seed)
    network = LocalOccupancyNetwork(config, calibration).to(device)
    sources = {name: collect(name, root, cache, per_class, teacher, teacher_clouds, device) for name in mix}
    examples = ThickenedSampler(
        sources,
        sampling,
        mix=mix,
        attacked=AttackedClouds.load(attacked) if attacked is not None else None,
        attacked_share=attacked_share if attacked is not None else 0.0,
    )
    metadata = {
        "network": "local",
        "config": json.dumps(dataclasses.asdict(config)),
        **calibration.metadata(),
    }
    run = fit(
        network,
        examples,
        examples.validation(VALIDATED),
        folder,
        options,
        settings={"network": dataclasses.asdict(config)},
        adam_layers=adam_layers(network),
        every=every,
        init=init,
        metadata=metadata,
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    distance = chamfer_l1(network, examples, MEASURED, device=device)
    click.echo(
        f"validation Chamfer-L1: {distance['clean']:.3f} (clean), {distance['corrupted']:.3f} (corrupted)"
    )
    if out is None:
        return
    parts = ", ".join(
        f"{name} (weight {weight:g}, {int((~sources[name].held).sum()):,} surfaces)"
        for name, weight in mix.items()
    )
    lines = [
        f"data: {parts}",
        f"validation IoU at queries near the surface and anywhere: {run.best['clean']:.3f} (clean input), "
        f"{run.best['corrupted']:.3f} (corrupted input)"
        + (f", {run.best['attacked']:.3f} (attacked input)" if attacked is not None else ""),
        f"validation Chamfer-L1, tenths of the longest side: {distance['clean']:.3f} (clean input), "
        f"{distance['corrupted']:.3f} (corrupted input); no surface for {distance['missing']:.0%}",
        f"frame: unit cube; label: logistic of width {sampling.softness} in the distance from the surface, "
        f"0.5 at {sampling.offset}; threshold {calibration.threshold}",
    ]
    size = sum(parameter.numel() for parameter in network.parameters())
    about = f"Local occupancy network, one code per point, {size:,} parameters, trained here."
    run.export(out, "ifdefense", about, lines)
