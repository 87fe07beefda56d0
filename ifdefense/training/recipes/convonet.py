"""``ifdefense train convonet``: from shapes to a Convolutional Occupancy Network with its model card."""

from __future__ import annotations

from typing import Any

import click
from torch import nn

from ifdefense.console import reported
from ifdefense.implicit.convolutional import ConvolutionalConfig, ConvolutionalNetwork
from ifdefense.training.commands import options_of, run_options
from ifdefense.training.examples.occupancy import SamplingOptions
from ifdefense.training.fit import TrainOptions
from ifdefense.training.recipes.solids import shape_options, train_on_solids

# Features are local, so the encoder gets all points of a typical cloud.
SAMPLING = SamplingOptions(batch_size=16, points=1024)


def adam_layers(network: ConvolutionalNetwork) -> list[nn.Module]:
    """Layers trained by Adam: the outermost ones."""
    encoder, decoder = network.encoder, network.decoder
    return [encoder.fc_pos, encoder.unet.conv_final, decoder.fc_p, decoder.fc_out]


@click.command("convonet")
@run_options("convonet", "cache/occupancy", TrainOptions(), every=250)
@shape_options(SAMPLING)
@options_of(SAMPLING, points="Points per cloud that the encoder sees.")
@click.option(
    "--widths",
    nargs=4,
    type=int,
    default=(32, 32, 16, 32),
    show_default=True,
    help="Encoder, planes, first level of the U-Net, decoder.",
)
@click.option("--depth", default=4, show_default=True, help="Levels of the U-Net.")
@click.option("--resolution", default=48, show_default=True, help="Cells per side of a plane.")
@click.option(
    "--bfloat16/--float32", default=True, show_default=True, help="Precision of the convolutions in training."
)
@reported()
def train_command(
    batch_size: int,
    queries: int,
    points: int,
    widths: tuple[int, int, int, int],
    depth: int,
    resolution: int,
    **settings: Any,
) -> None:
    """Trains a Convolutional Occupancy Network, on the shapes and queries of train onet.

    Validation shapes are as for train onet. A run can only be resumed with the same options, except for more
    steps.
    """
    encoder, features, filters, decoder = widths
    config = ConvolutionalConfig(encoder, features, filters, depth, decoder, resolution)
    train_on_solids(
        "convolutional",
        config,
        lambda calibration: ConvolutionalNetwork(config, calibration),
        adam_layers,
        "Convolutional Occupancy Network with three planes (Peng et al., ECCV 2020)",
        SamplingOptions(batch_size=batch_size, queries=queries, points=points),
        **settings,
    )
