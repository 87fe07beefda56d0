"""``ifdefense train anomaly``: the head that detects anomalous points."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ifdefense.console import device_option, reported
from ifdefense.data.modelnet import load_modelnet40
from ifdefense.devices import device_of_weights
from ifdefense.implicit.anomaly import AnomalyNetwork
from ifdefense.training.commands import prepare
from ifdefense.training.data.surfaces import collect, held_out
from ifdefense.training.examples.anomalies import MIX, SurfaceSource, WholeClouds, examples

VALIDATED = 0.05
"""Share of the clouds used for validation, from held-out shapes."""

BATCH = 2048
RATE = 2e-3


def fit_head(network: AnomalyNetwork, inputs: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Trains the head of a network in place: AdamW with a cosine schedule on the binary cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    head, device = network.head, device_of_weights(network)
    inputs, labels = inputs.to(device), labels.to(device)
    order = torch.randperm(len(inputs), generator=generator)[:50_000]
    part = inputs[order.to(device)].float()
    head.mean.copy_(part.mean(0))
    head.std.copy_(part.std(0) + 1e-3)
    optimiser = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in tqdm(range(steps), desc="head", mininterval=5):
        index = torch.randint(len(inputs), (BATCH,), generator=generator).to(device)
        loss = F.binary_cross_entropy_with_logits(head(inputs[index].float()), labels[index].float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def recall(network: AnomalyNetwork, inputs: Tensor, labels: Tensor, false: float = 0.01) -> float:
    """Recall of anomalous points at a false positive rate of ``false``."""
    device = device_of_weights(network)
    logits = torch.cat([network.head(part.float().to(device)).cpu() for part in inputs.split(8192)])
    ordered = logits[labels == 0].sort().values
    limit = ordered[min(len(ordered) - 1, int((1 - false) * len(ordered)))]
    return float((logits[labels == 1] > limit).float().mean())


@click.command("anomaly")
@click.option("--data", "root", help="Data folder; by default that in IFDEFENSE_DATA.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("cache/surfaces"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Weights, .safetensors.")
@click.option("--force", is_flag=True, help="Replace the weights.")
@click.option("--local", "local_weights", default="local", show_default=True, help="Local network.")
@click.option("--prior", "prior_weights", default="onet", show_default=True, help="Occupancy Network.")
@click.option("--clouds", type=click.IntRange(min=20), default=5000, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=4000, show_default=True)
@click.option("--per-class", default=60, show_default=True, help="Procedural shapes per class.")
@click.option("--seed", default=0, show_default=True)
@device_option
@reported()
def train_command(
    root: str | None,
    cache: Path,
    out: Path,
    force: bool,
    local_weights: str,
    prior_weights: str,
    clouds: int,
    steps: int,
    per_class: int,
    seed: int,
    device: torch.device,
) -> None:
    """Trains the head of the anomaly network on planted anomalies; both of its networks are frozen.

    The weights are those of the head and refer to those of the networks.
    """
    prepare(out, force, cache)
    torch.manual_seed(seed)
    network = AnomalyNetwork.untrained(local_weights, prior_weights).to(device)
    started = time.process_time()
    whole = load_modelnet40(root, "train")
    sources: dict[str, SurfaceSource] = {"modelnet40": WholeClouds(whole.points, held_out(whole.labels))}
    for name in MIX:
        if name not in sources:
            sources[name] = collect(name, root, cache, per_class, None, 0, device)
    fit_head(network, *examples(network, sources, clouds, seed, held=False), steps, seed)
    found = recall(network, *examples(network, sources, max(20, int(VALIDATED * clouds)), seed, held=True))
    used = time.process_time() - started
    settings = {"clouds": clouds, "steps": steps, "seed": seed, "recall": round(found, 3)}
    network.save(out, training=json.dumps(settings))
    click.echo(
        f"anomalous points found where 1% of the others is marked: {found:.1%}; {used:.0f} s of a core"
    )
