"""``ifdefense train onet``: from solids to an Occupancy Network with its model card."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from ifdefense.console import reported
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.training.commands import run_options
from ifdefense.training.examples.occupancy import SamplingOptions
from ifdefense.training.fit import TrainOptions
from ifdefense.training.recipes.solids import shape_options, train_on_solids


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
    shards, or procedural shapes if the mix has neither. A run can only be resumed with the same options,
    except for more steps.
    """
    config = OccupancyConfig(*widths, frequencies)
    for name, width in dataclasses.asdict(config).items():
        if width < (0 if name == "frequencies" else 1):
            raise ValueError(f"{name} of the network must be positive, got {width}")
    train_on_solids(
        "occupancy",
        config,
        lambda calibration: OccupancyNetwork(config, calibration),
        lambda network: (network.encoder.fc_pos, network.decoder.fc_p, network.decoder.fc_out),
        "Occupancy Network conditioned on point clouds (Mescheder et al., CVPR 2019)",
        SamplingOptions(batch_size=batch_size, queries=queries),
        **settings,
    )
