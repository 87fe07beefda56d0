"""Trains the classifiers: ``python -m classifiers.train --help``.

The published recipe (yanx27, IF-Defense: Adam 1e-3, 200 epochs of 1,024 points) takes a day without a GPU.
With max-pooling over points, random subsets of a cloud are nearly as good for training as all points, so most
epochs use few points per cloud and only the last ones use all: the schedule ``256x18,512x4,1024x1`` is 18
epochs of 256 random points, and so on; ``1024x0.3`` is an epoch of three tenths of the clouds. Networks with
neighbourhoods use proportionally fewer neighbours and centres, so that the extent of neighbourhoods is
constant.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import click
import torch

import ifdefense
from classifiers import NETWORKS, build
from classifiers.options import ClassifierOptions, MatmulPrecision, Schedule
from classifiers.run import ATTACK_STEPS, ATTACKED, THROUGH, ClassifierRun, accuracy
from ifdefense import Purifier
from ifdefense.checkpoints import load_weights
from ifdefense.console import device_option, reported, use_huge_pages
from ifdefense.provenance import digest
from ifdefense.purifiers.registry import METHODS
from ifdefense.training.commands import options_of, output_options, prepare
from ifdefense.training.data.clouds import TrainingClouds, load_training_clouds

SURROGATE = "sor-smooth"
"""Purifier whose gradient stands for that of `--through`."""


def load_data(
    data: str, hybrid: Path | None, hybrid_validation: Path | None
) -> tuple[TrainingClouds, dict[str, TrainingClouds], int]:
    """Training clouds, validation clouds by name, and the number of classes.

    Args:
        data: ``"modelnet40"`` (root from ``IFDEFENSE_DATA``) or ``"procedural"``.
        hybrid: npz of purified copies of the training clouds, see `TrainingClouds.of_file`.
        hybrid_validation: the same for the validation clouds.

    Raises:
        DataError: if the data is missing or unusable.
    """
    train, validation, num_classes = load_training_clouds(data)
    named = {"validation": validation}
    if hybrid is not None:
        train = train.joined(TrainingClouds.of_file(hybrid))
    if hybrid_validation is not None:
        named["purified"] = TrainingClouds.of_file(hybrid_validation)
    return train, named, num_classes


def _purifiers(through: str | None, device: torch.device) -> tuple[Purifier, Purifier] | None:
    """The purifier to attack through and the one that gives the gradients."""
    if through is None:
        return None
    return ifdefense.load(through, device=device), ifdefense.load(SURROGATE, device=device)


def _parse_schedule(text: str) -> Schedule:
    try:
        parts = [part.split("x") for part in text.split(",")]
        schedule = tuple((int(points), float(epochs)) for points, epochs in parts)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a schedule such as 256x18,512x4,1024x0.5") from None
    if not all(points >= 1 and 0 < epochs < math.inf for points, epochs in schedule):
        raise click.BadParameter(f"{text!r} has an entry without points or epochs")
    return schedule


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data", type=click.Choice(["modelnet40", "procedural"]), default="modelnet40", show_default=True
)
@click.option("--model", "network", type=click.Choice(list(NETWORKS)), default="pointnet", show_default=True)
@output_options(None)
@click.option(
    "--schedule", default="256x18,512x4,1024x1", show_default=True, help="Points x epochs, comma-separated."
)
@options_of(
    ClassifierOptions,
    batch_size="Clouds per step.",
    lr="Largest learning rate.",
    weight_decay="Of AdamW.",
    label_smoothing="Label smoothing.",
    max_rotation="Largest rotation about the up axis, degrees.",
    max_scale="Largest factor along each axis.",
    max_shift="Largest shift along each axis.",
    jitter="Standard deviation of the noise.",
    mix="Probability that a batch is mixed (PointCutMix).",
    warmup="Share of the steps before the cosine.",
    adversarial="Share of each batch that is attacked in L∞ (adversarial training).",
    delta="Radius of that attack, unit sphere.",
    attack_steps="Gradients of that attack.",
    coherent="Average its shifts over up to this number of 256 points, proportionally for more.",
    coherent_share="Share of the batches with averaged shifts.",
    through_share="Share of the batches that is attacked through --through.",
    average="Decay of a moving average of the weights.",
    half_search="Search PointNet's largest points in bfloat16.",
)
@click.option(
    "--matmul-precision",
    type=click.Choice(get_args(MatmulPrecision)),
    default=ClassifierOptions.matmul_precision,
    show_default=True,
    help="Of the products in training; medium is faster on some processors.",
)
@click.option("--seed", type=click.IntRange(min=0), default=ClassifierOptions.seed, show_default=True)
@device_option
@click.option(
    "--feature-transform/--no-feature-transform", default=True, show_default=True, help="PointNet's."
)
@click.option(
    "--through",
    type=click.Choice(list(METHODS)),
    help=f"Attack a share of the batches through this purifier, with the gradient of {SURROGATE}.",
)
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="Weights to start from.")
@click.option(
    "--hybrid", type=click.Path(exists=True, path_type=Path), help="Purified copies of the training clouds."
)
@click.option(
    "--hybrid-validation", type=click.Path(exists=True, path_type=Path), help="The same for validation."
)
@click.option(
    "--test/--no-test", default=False, help="Measure the test accuracy of the kept weights (ModelNet40)."
)
@reported()
def main(
    data: str,
    network: str,
    folder: Path,
    out: Path | None,
    force: bool,
    schedule: str,
    device: torch.device,
    feature_transform: bool,
    through: str | None,
    init: Path | None,
    hybrid: Path | None,
    hybrid_validation: Path | None,
    test: bool,
    progress: bool,
    **settings: Any,
) -> None:
    """Trains a classifier and keeps the weights with the best validation accuracy."""
    use_huge_pages()
    if test and data != "modelnet40":
        raise click.UsageError(f"--test measures on ModelNet40, not on {data}")
    if (through is None) != (settings["through_share"] == 0):
        raise click.UsageError("--through and --through-share belong together; give both or neither")
    options = ClassifierOptions(_parse_schedule(schedule), **settings)
    prepare(out, force, folder)
    train, validation, num_classes = load_data(data, hybrid, hybrid_validation)
    torch.manual_seed(options.seed)
    extra = {"feature_transform": feature_transform} if network == "pointnet" else {}
    model = build(network, num_classes, **extra)
    if init is not None:
        load_weights(model, init)
    run = ClassifierRun(
        model.to(device),
        train,
        validation,
        options,
        folder,
        {"model": network, **extra, "init": None if init is None else digest(init.read_bytes())},
        _purifiers(through, device),
    )
    run.resume()
    best = run(progress)
    run.load_best()
    lines = [f"data: {data}, {len(train)} training clouds"]
    lines += [f"{name} accuracy: {best[name]:.2%} of {len(clouds)}" for name, clouds in validation.items()]
    together = f", {options.coherent} of 256 points together" if options.coherent > 1 else ""
    lines += [
        f"{name} accuracy in L∞ {options.delta}, {ATTACK_STEPS} steps{together}: {best[score]:.2%} of "
        f"{min(ATTACKED, len(clouds))}"
        for name, clouds in validation.items()
        if (score := f"{name}, attacked") in best
    ]
    if THROUGH in best:
        lines.append(
            f"validation accuracy {THROUGH} ({through}, gradient of {SURROGATE}) in L∞ {options.delta}, "
            f"{ATTACK_STEPS} steps: {best[THROUGH]:.2%} of {min(ATTACKED, len(validation['validation']))}"
        )
    if test:
        from ifdefense.data.modelnet import load_modelnet40

        part = load_modelnet40(split="test")
        best["test"] = accuracy(model, TrainingClouds.of_arrays(part.points, part.labels))
        lines.append(f"test accuracy, measured once: {best['test']:.2%} of {len(part.points)}")
    if out is not None:
        size = sum(parameter.numel() for parameter in model.parameters())
        about = (
            f"{type(model).__name__} of {size:,} parameters, from (B, N, 3) mean-centred clouds of largest "
            "norm 1, z up, to logits."
        )
        run.export(out, "python -m classifiers.train", about, lines)
    click.echo(json.dumps(best))


if __name__ == "__main__":
    main()
