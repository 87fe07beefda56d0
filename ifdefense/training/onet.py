"""``ifdefense train onet``: from shapes to an Occupancy Network with its model card.

What other networks share that learn from the same shapes: `shape_options` and `train_on_shapes`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ifdefense.data.modelnet import Split
from ifdefense.data.packed import data_folder
from ifdefense.geometry.axes import AXES, UP, turned
from ifdefense.implicit.base import Calibration
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.provenance import digest
from ifdefense.training.collections import (
    Labels,
    cached,
    from_clouds,
    from_meshes,
    from_modelnet40,
    from_procedural,
    read_folder,
)
from ifdefense.training.commands import (
    Command,
    mix_of,
    options_of,
    prepare,
    reported,
    run_options,
    with_options,
)
from ifdefense.training.fit import TrainOptions, fit
from ifdefense.training.occupancies import OFFSET, OccupancySet, concatenate
from ifdefense.training.sampling import OccupancySampler, SamplingOptions
from ifdefense.training.surfaces import chamfer_l1

SOURCES = ("modelnet40", "meshes", "procedural", "points")
POINTS = "points"
SECOND_THRESHOLD = 0.2
"""Thin shapes may show no surface at 0.5; the published networks are read at 0.2."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Where shapes come from.

    Attributes:
        mix: weights of the sources.
        root: data folder.
        clouds: folder of clouds, the source ``"points"``.
        labels: who says which solid is behind a cloud.
        cache: folder of the prepared shapes.
        per_class: procedural shapes per class.
        seed: of their draw.
        up: up axis of the clouds, which are turned z up, as the other sources are.
    """

    mix: dict[str, float]
    root: str | None
    clouds: Path | None
    labels: Labels
    cache: Path
    per_class: int
    seed: int
    up: str = UP

    def train(self) -> OccupancySet:
        """Shapes of all sources, named by them."""
        parts = {name: self._collect(name) for name in self.mix}
        return concatenate([dataclasses.replace(part, sources=(name,)) for name, part in parts.items()])

    def validation(self) -> OccupancySet:
        """Shapes that no training sees."""
        if self.clouds is not None:
            return self._clouds(held=True)
        if "modelnet40" in self.mix:
            return self._modelnet40("validation")
        seed = self.seed + 2
        return cached(self.cache / "procedural-validation", lambda: from_procedural(4, seed), {"seed": seed})

    def _collect(self, name: str) -> OccupancySet:
        """The training shapes of a source."""
        seed = self.seed
        if name == POINTS:
            return self._clouds(held=False)
        if name == "modelnet40":
            return self._modelnet40("train")
        if name == "procedural":
            settings: dict[str, Any] = {"per_class": self.per_class, "seed": seed + 1}
            return cached(self.cache / name, lambda: from_procedural(self.per_class, seed + 1), settings)
        folder = str(data_folder(self.root, name).resolve())
        return cached(
            self.cache / name, lambda: from_meshes(self.root, seed), {"folder": folder, "seed": seed}
        )

    def _modelnet40(self, split: Split) -> OccupancySet:
        folder = str(data_folder(self.root, "modelnet40").resolve())
        return cached(
            self.cache / f"modelnet40-{split}",
            lambda: from_modelnet40(self.root, split, self.labels),
            {"folder": folder, "labels": self.labels},
        )

    @functools.cached_property
    def _read(self) -> list[NDArray[np.floating]]:
        """The clouds of the folder, z up."""
        assert self.clouds is not None
        return [turned(cloud, self.up) for cloud in read_folder(self.clouds)]

    def _clouds(self, held: bool) -> OccupancySet:
        """Every tenth cloud of the folder, or the others."""
        part = [cloud for index, cloud in enumerate(self._read) if (index % 10 == 0) == held]
        name = "points-validation" if held else POINTS
        return cached(
            self.cache / name,
            lambda: from_clouds(part, name, self.labels, self.seed),
            {"clouds": digest(*part), "labels": self.labels, "seed": self.seed},
        )


def shape_options(sampling: SamplingOptions) -> Callable[[Command], Command]:
    """Options of the networks that learn from these shapes, beside `run_options`."""
    options = (
        click.option(
            "--mix",
            multiple=True,
            callback=mix_of(SOURCES, {}),
            help="NAME=WEIGHT of a source: modelnet40, meshes, procedural or points.  [default: points with "
            "--from-points, else procedural]",
        ),
        click.option(
            "--from-points",
            "clouds",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder of clouds without meshes, the source points; every tenth cloud validates.",
        ),
        click.option(
            "--up",
            type=click.Choice(AXES),
            default=UP,
            show_default=True,
            help="Up axis of the clouds of --from-points; the network is trained on them z up.",
        ),
        click.option(
            "--labels",
            type=click.Choice(get_args(Labels)),
            default="local",
            show_default=True,
            help="Who says which solid is behind a cloud: the local network, or planes and rays.",
        ),
        options_of(sampling, batch_size="Clouds per step.", queries="Queries per cloud."),
        options_of(TrainOptions, weight_decay="Of Muon's matrices."),
        click.option(
            "--per-class",
            type=click.IntRange(min=1),
            default=100,
            show_default=True,
            help="Procedural shapes per class.",
        ),
    )
    return with_options(*options)


def train_on_shapes(
    kind: str,
    config: Any,
    create: Callable[[Calibration], Any],
    adam_layers: Callable[[Any], Iterable[nn.Module]],
    title: str,
    sampling: SamplingOptions,
    *,
    mix: dict[str, float],
    root: str | None,
    clouds: Path | None,
    up: str,
    labels: Labels,
    cache: Path,
    folder: Path,
    out: Path | None,
    force: bool,
    init: Path | None,
    per_class: int,
    every: int,
    device: torch.device,
    progress: bool | None,
    **settings: Any,
) -> None:
    """Trains a network and writes its weights; the body of the commands.

    Args:
        kind: name of the network in `ifdefense.implicit.base.NETWORKS`.
        config: dataclass of its sizes.
        create: makes it.
        adam_layers: its first and last layers.
        title: name and paper, for the model card.
        sampling: how examples are drawn.
        mix: weights of the sources.
        root: data folder.
        clouds: folder of clouds, the source ``"points"``.
        up: up axis of these clouds.
        labels: who says which solid is behind a cloud.
        cache: folder of the prepared shapes.
        folder: of the run.
        out: where the weights go.
        force: whether ``out`` may be replaced.
        init: weights to start from.
        per_class: procedural shapes per class.
        every: steps between validations.
        device: of the network.
        progress: whether to show a bar; by default on a terminal.
        settings: of `TrainOptions`.
    """
    options = TrainOptions(**settings)
    prepare(out, force, folder)
    mix = mix or {"procedural" if clouds is None else POINTS: 1.0}
    if (POINTS in mix) != (clouds is not None):
        raise ValueError("the source points and --from-points FOLDER belong together")
    shapes = Shapes(mix, root, clouds, labels, cache, per_class, options.seed, up)
    calibration = Calibration(sampling.box, options.threshold, SECOND_THRESHOLD, OFFSET, sampling.points)
    torch.manual_seed(options.seed)
    network = create(calibration).to(device)
    data = shapes.train()
    examples = OccupancySampler(data, sampling, shapes.mix)
    validation = OccupancySampler(shapes.validation(), sampling)
    metadata = {
        "network": kind,
        "config": json.dumps(dataclasses.asdict(config)),
        **calibration.metadata(),
    }
    run = fit(
        network,
        examples,
        validation.validation(256),
        folder,
        options,
        settings={"network": dataclasses.asdict(config), "validation": validation.digest},
        adam_layers=adam_layers(network),
        every=every,
        init=init,
        metadata=metadata,
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    distance = chamfer_l1(network, validation, device=device)
    click.echo(
        f"validation Chamfer-L1: {distance['clean']:.3f} (clean), {distance['corrupted']:.3f} (corrupted)"
    )
    if out is None:
        return
    sources = ", ".join(f"{name} (weight {weight:g})" for name, weight in mix.items())
    taught = f"; solids behind clouds: {labels}" if {"modelnet40", POINTS} & set(mix) else ""
    lines = [
        f"data: {sources}; {len(data)} shapes{taught}",
        f"validation IoU: {run.best['clean']:.3f} (clean input), "
        f"{run.best['corrupted']:.3f} (corrupted input)",
        f"validation Chamfer-L1, tenths of the longest side: {distance['clean']:.3f} (clean input), "
        f"{distance['corrupted']:.3f} (corrupted input); no surface for {distance['missing']:.0%}",
        f"frame: unit cube; label: inside the solid thickened by {calibration.offset}; "
        f"threshold {calibration.threshold}",
    ]
    size = sum(parameter.numel() for parameter in network.parameters())
    run.export(out, "ifdefense", f"{title}, {size:,} parameters, trained here.", lines)


@click.command("onet")
@run_options("onet", "cache/occupancy", TrainOptions(), every=250)
@shape_options(SamplingOptions())
@click.option(
    "--widths", nargs=3, type=int, default=(128, 256, 128), show_default=True, help="Encoder, code, decoder."
)
@click.option(
    "--frequencies", default=5, show_default=True, help="Octaves of the positional encoding, 0 for none."
)
@reported()
def train_command(
    batch_size: int, queries: int, widths: tuple[int, int, int], frequencies: int, **settings: Any
) -> None:
    """Trains an Occupancy Network.

    Validation shapes are every tenth cloud of --from-points, or ModelNet40 clouds held out of its train
    shards, or procedural shapes where the mix has neither. A run is resumed only with the options it was
    started with, but for more steps.
    """
    config = OccupancyConfig(*widths, frequencies)
    for name, width in dataclasses.asdict(config).items():
        if width < (0 if name == "frequencies" else 1):
            raise ValueError(f"{name} of the network must be positive, got {width}")
    train_on_shapes(
        "occupancy",
        config,
        lambda calibration: OccupancyNetwork(config, calibration),
        lambda network: (network.encoder.fc_pos, network.decoder.fc_p, network.decoder.fc_out),
        "Occupancy Network conditioned on point clouds (Mescheder et al., CVPR 2019)",
        SamplingOptions(batch_size=batch_size, queries=queries),
        **settings,
    )
