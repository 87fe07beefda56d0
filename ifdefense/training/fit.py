"""Trains an Occupancy Network on an occupancy set; needs nothing but torch, NumPy and tqdm."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ifdefense.checkpoints import load_into, load_state
from ifdefense.corruptions.simulated import simulate_attack
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork, occupancy_loss
from ifdefense.training.muon import Muon, split_parameters
from ifdefense.training.occupancies import OccupancySet, field_at
from ifdefense.training.runs import save_state

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Settings of a run. Lengths are in the unit-cube frame.

    Attributes:
        config: widths of the network.
        steps: optimiser steps.
        batch: clouds a step.
        points: points of a cloud that the encoder sees.
        queries: queries a cloud; half of them uniform in the box, half near the surface.
        near: standard deviation of the near-surface queries.
        box: side of the cube that uniform queries are drawn from.
        rate: learning rate of Muon, for hidden weight matrices, after the warm-up; held until the decay
            begins.
        weight_decay: of the matrices that Muon trains.
        rest: learning rate of Adam, for all other parameters, on the same schedule.
        warmup: steps of linear warm-up.
        decay: share of the steps at the end over which the rates fall to a hundredth along a cosine.
        clean: share of the clouds that are given uncorrupted, but for noise of ``jitter``.
        jitter: standard deviation of the noise on uncorrupted clouds.
        stretch: each axis is scaled by up to this factor or its inverse.
        turn: share of the clouds turned about the up axis by a random multiple of 90°.
        threshold: probability above which a query counts as inside in the validation IoU.
        seed: seed of the weights and of every draw.
    """

    config: OccupancyConfig = OccupancyConfig(encoder=128, code=256, decoder=128, frequencies=5)
    steps: int = 6000
    batch: int = 32
    points: int = 300
    queries: int = 256
    near: float = 0.04
    box: float = 1.2
    rate: float = 0.02
    weight_decay: float = 0.05
    rest: float = 1e-3
    warmup: int = 100
    decay: float = 0.4
    clean: float = 0.4
    jitter: float = 0.005
    stretch: float = 1.2
    turn: float = 0.1
    threshold: float = 0.5
    seed: int = 0


class Sampler:
    """Draws training batches: augmented clouds as an attacker leaves them, and queries with their occupancy.

    The encoder sees a cloud in the frame of what it is given, as at inference: outliers and missing parts
    move the bounding box, and the queries move with it.

    Args:
        data: shapes to draw from.
        options: settings.
        mix: weight of each source of the set; ``None`` draws every shape equally often.
    """

    def __init__(
        self, data: OccupancySet, options: TrainOptions, mix: Mapping[str, float] | None = None
    ) -> None:
        self.points = torch.from_numpy(np.array(data.points))
        self.fields = torch.from_numpy(np.array(data.fields))
        self.options = options
        weight = np.ones(len(data))
        if mix is not None:
            unknown = set(mix) - set(data.sources)
            if unknown:
                raise ValueError(f"unknown sources {sorted(unknown)}, the set has {list(data.sources)}")
            for number, name in enumerate(data.sources):
                members = np.asarray(data.source) == number
                weight[members] = mix.get(name, 0.0) / max(members.sum(), 1)
        self.weight = torch.from_numpy(weight / weight.sum())

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Clouds ``(B, N, 3)``, queries ``(B, Q, 3)`` and labels ``(B, Q)`` of one training step."""
        options = self.options
        index = torch.multinomial(self.weight, options.batch, replacement=True, generator=generator)
        scale = torch.empty(options.batch, 1, 3).uniform_(
            -math.log(options.stretch), math.log(options.stretch), generator=generator
        )
        scale = scale.exp()
        sign = torch.randint(0, 2, (options.batch, 1, 3), generator=generator).mul_(2).sub_(1)
        sign[..., 2] = 1  # up stays up
        quarter = torch.randint(1, 4, (options.batch,), generator=generator)
        turned = torch.rand(options.batch, generator=generator) < options.turn
        points = self.points[index].float()
        scale = scale / (scale * points.abs().amax(1, keepdim=True)).amax(-1, keepdim=True) / 2
        turn = _quarter_turns(torch.where(turned, quarter, 0))
        whole = (points * scale * sign) @ turn
        clean = torch.rand(options.batch, generator=generator) < options.clean
        given = self._given(whole, clean, generator)
        centre, extent = bounding_cube(given)
        near = _subset(whole, options.queries // 2, generator)
        near = near + options.near * torch.randn(near.shape, generator=generator)
        uniform = torch.rand(options.batch, options.queries - near.shape[1], 3, generator=generator) - 0.5
        queries = torch.cat([near, uniform * options.box * extent + centre], dim=1)
        labels = field_at(self.fields, index, queries @ turn.transpose(1, 2) / (scale * sign)) > 0
        return (given - centre) / extent, (queries - centre) / extent, labels

    def _given(self, whole: Tensor, clean: Tensor, generator: torch.Generator) -> Tensor:
        """What the encoder is given of ``(B, N, 3)`` clouds: noise alone where ``clean``, else corruption."""
        sound = _subset(whole, self.options.points, generator)
        sound = sound + self.options.jitter * torch.randn(sound.shape, generator=generator)
        spoilt = simulate_attack(whole, self.options.points, generator)
        return torch.where(clean[:, None, None], sound, spoilt)

    def _held(self, count: int, corrupted: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points of the first ``count`` shapes, unaugmented, and what the encoder is given of them."""
        whole = self.points[:count].float()
        return whole, self._given(whole, torch.full((len(whole),), not corrupted), generator)

    def surfaces(self, count: int, corrupted: bool) -> tuple[Tensor, Tensor]:
        """What the encoder sees of the first ``count`` shapes, and all their points in the same frame."""
        whole, given = self._held(count, corrupted, torch.Generator().manual_seed(1))
        centre, extent = bounding_cube(given)
        return (given - centre) / extent, (whole - centre) / extent

    def validation(
        self, count: int, corrupted: bool, device: str | torch.device = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clouds, queries and labels of the first ``count`` shapes, unaugmented, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        _, given = self._held(count, corrupted, generator)
        index = torch.arange(len(given))
        centre, extent = bounding_cube(given)
        uniform = torch.rand(len(index), 2048, 3, generator=generator) - 0.5
        queries = uniform * self.options.box * extent + centre
        labels = field_at(self.fields, index, queries) > 0
        clouds = (given - centre) / extent
        return clouds.to(device), (uniform * self.options.box).to(device), labels.to(device)


def bounding_cube(points: Tensor) -> tuple[Tensor, Tensor]:
    """Centre ``(B, 1, 3)`` and longest side ``(B, 1, 1)`` of the bounding boxes of ``(B, N, 3)`` clouds."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    return (low + high) / 2, (high - low).amax(-1, keepdim=True)


def _subset(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random subset of ``count`` points of each cloud."""
    order = torch.rand(points.shape[:2], generator=generator).argsort(1)[:, :count]
    return points.gather(1, order[..., None].expand(-1, -1, 3))


def _quarter_turns(number: Tensor) -> Tensor:
    """Rotations ``(B, 3, 3)`` about the up axis, for row vectors, by multiples of 90°."""
    angle = number * (math.pi / 2)
    cos, sin = angle.cos().round(), angle.sin().round()
    turn = torch.zeros(len(number), 3, 3)
    turn[:, 0, 0], turn[:, 0, 1], turn[:, 1, 0], turn[:, 1, 1], turn[:, 2, 2] = cos, sin, -sin, cos, 1.0
    return turn


def schedule(step: int, options: TrainOptions) -> float:
    """Factor of the learning rates at a step: linear warm-up, plateau, cosine to a hundredth."""
    rise = min(1.0, (step + 1) / max(options.warmup, 1))
    left = (options.steps - step) / max(options.steps * options.decay, 1.0)
    return rise if left >= 1 else rise * (0.01 + 0.99 * (1 - math.cos(math.pi * max(left, 0.0))) / 2)


@torch.no_grad()
def intersection_over_union(
    network: OccupancyNetwork, probe: tuple[Tensor, Tensor, Tensor], threshold: float
) -> float:
    """Mean IoU of the occupancies at the queries, over clouds whose labels hold an inside.

    Args:
        network: the network, in evaluation mode.
        probe: clouds ``(S, N, 3)``, queries ``(S, Q, 3)`` and labels ``(S, Q)``.
        threshold: probability above which a query is inside.
    """
    clouds, queries, labels = probe
    logit = math.log(threshold / (1 - threshold))
    scores = []
    for part in torch.arange(len(clouds)).split(16):
        field = network.field(clouds[part])
        cloud = torch.arange(len(part)).repeat_interleave(queries.shape[1])
        inside = field(queries[part].reshape(-1, 3), cloud.to(clouds.device)).view(len(part), -1) > logit
        union = (inside | labels[part]).sum(1)
        scores.append(((inside & labels[part]).sum(1) / union)[union > 0])
    return float(torch.cat(scores).mean())


def fit(
    data: OccupancySet,
    validation: OccupancySet,
    folder: str | Path,
    options: TrainOptions = TrainOptions(),
    *,
    mix: Mapping[str, float] | None = None,
    device: str | torch.device = "cpu",
    every: int = 250,
    validate: int = 256,
    init: str | Path | None = None,
    stop_after: int | None = None,
) -> OccupancyNetwork:
    """Trains a network, or goes on with the run that ``folder`` holds.

    ``folder/last.pt`` is written every ``every`` steps and resumes bit for bit on the same machine;
    ``folder/best.pt`` holds the weights with the best mean of clean and corrupted validation IoU;
    ``folder/log.jsonl`` the curve.

    Args:
        data: shapes to train on.
        validation: shapes to validate on.
        folder: folder of the run.
        options: settings. A run may be resumed with other ``steps``, which moves the decay of the rate.
        mix: weight of each source of ``data``.
        device: where the network is trained.
        every: steps between validations.
        validate: number of validation shapes.
        init: weights that a new run starts from.
        stop_after: stops after this many steps of this call, as an interruption would, checkpoint written.

    Returns:
        The network with the best validation IoU, in evaluation mode, on ``device``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    network = OccupancyNetwork(options.config).to(device)
    if init is not None:
        load_into(network, load_state(init), init)
    hidden, others = split_parameters(
        network, (network.encoder.fc_pos, network.decoder.fc_p, network.decoder.fc_out)
    )
    optimisers = {
        Muon(hidden, options.rate, weight_decay=options.weight_decay): options.rate,
        torch.optim.Adam(others, options.rest): options.rest,
    }
    generator = torch.Generator().manual_seed(options.seed)
    step, best = 0, -math.inf
    if (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt", map_location=device, weights_only=True)
        network.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        generator.set_state(state["generator"].cpu())
        step, best = state["step"], state["best"]
        logger.info("resumed %s at step %d", folder, step)
    sampler = Sampler(data, options, mix)
    held = Sampler(validation, options)
    probes = {name: held.validation(validate, name == "corrupted", device) for name in ("clean", "corrupted")}
    last = options.steps if stop_after is None else min(options.steps, step + stop_after)
    losses: list[float] = []
    started = time.monotonic()
    bar = tqdm(total=options.steps, initial=step, desc="onet", mininterval=10)
    while step < last:
        for optimiser, rate in optimisers.items():
            optimiser.param_groups[0]["lr"] = rate * schedule(step, options)
        clouds, queries, labels = (part.to(device) for part in sampler.draw(generator))
        network.train()
        loss = occupancy_loss(network(clouds, queries), labels)
        network.zero_grad(set_to_none=True)
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        losses.append(loss.item() / options.queries)
        step += 1
        bar.update()
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss is {losses[-1]} at step {step}; resume from {folder / 'last.pt'}")
        if step % every and step != last:
            continue
        network.eval()
        scores = {
            name: intersection_over_union(network, probe, options.threshold) for name, probe in probes.items()
        }
        mean = sum(scores.values()) / len(scores)
        if mean > best:
            best = mean
            save_state(folder / "best.pt", {"model": network.state_dict(), "step": step, "iou": scores})
        record = {
            "step": step,
            "loss": float(np.mean(losses)),
            "seconds": time.monotonic() - started,
            "iou": scores,
        }
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        bar.set_postfix(
            loss=f"{record['loss']:.4f}", **{name: f"{score:.3f}" for name, score in scores.items()}
        )
        losses.clear()
        save_state(
            folder / "last.pt",
            {
                "model": network.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "generator": generator.get_state(),
                "step": step,
                "best": best,
            },
        )
    bar.close()
    network.load_state_dict(torch.load(folder / "best.pt", map_location=device, weights_only=True)["model"])
    return network.eval()
