"""Attack for adversarial training, on the current network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense import Defended, Purifier
from ifdefense.arguments import MAX_SEED
from ifdefense.geometry.points import gather, knn
from ifdefense.logits import classify, frozen


def attacked(
    model: nn.Module,
    points: Tensor,
    labels: Tensor,
    delta: float,
    steps: int,
    generator: torch.Generator,
    neighbours: int = 1,
) -> Tensor:
    """Projected gradient ascent of the cross-entropy in an L∞ ball, from a random start.

    Madry et al., 2018, `arXiv:1706.06083 <https://arxiv.org/abs/1706.06083>`_. Runs in evaluation mode, so
    that batch statistics do not change; the mode is restored, also after an error.

    Args:
        model: ``(B, N, 3)`` clouds to logits.
        points: ``(B, N, 3)`` clouds.
        labels: ``(B,)`` int64 classes.
        delta: radius of the ball, in the unit of the points.
        steps: gradients, each followed by a step of ``2 delta / steps`` along its sign; at least 1.
        generator: source of the random start.
        neighbours: each point moves by the mean shift of this number of nearest points, including itself. A
            reconstructed surface only follows coherent shifts, so this approximates attacks through a
            purifier at a fraction of the cost; 1 for independent points.

    Returns:
        ``(B, N, 3)`` clouds within ``delta`` of the points along every coordinate.
    """
    start = torch.rand(points.shape, generator=generator).to(points) * 2 - 1
    shift = delta * start
    around = knn(points, points, neighbours)[1] if neighbours > 1 else None

    def moved(shift: Tensor) -> Tensor:
        return points + (shift if around is None else gather(shift, around).mean(2))

    with frozen(model):  # gradients of the weights would cost as much as those of the points
        for _ in range(steps):
            shift.requires_grad_()
            loss = F.cross_entropy(classify(model, moved(shift)), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, shift)
            with torch.no_grad():
                shift = (shift + 2 * delta / steps * gradient.sign()).clamp(-delta, delta)
    return moved(shift.detach())


def attacked_through(
    model: nn.Module,
    purifier: Purifier,
    surrogate: Purifier,
    points: Tensor,
    labels: Tensor,
    count: int,
    delta: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Clouds attacked through a surrogate of a purifier, then purified.

    The gradient of a purifier that reconstructs a surface is expensive and differs from draw to draw; the
    one of smoothing is neither, and its shifts remain in the reconstruction.

    Args:
        model: ``(B, N, 3)`` clouds to logits.
        purifier: purifies the attacked clouds; needs no gradient.
        surrogate: purifier in front of the model while it is attacked, differentiable.
        points: ``(B, N, 3)`` clouds.
        labels: ``(B,)`` int64 classes.
        count: points per purified cloud.
        delta: radius of the ball, in the unit of the points.
        steps: gradients.
        generator: source of the random start and of the seeds of both purifiers.

    Returns:
        ``(B, count, 3)`` purified clouds in the frame of the points.
    """
    seed, other = (int(torch.randint(MAX_SEED, (1,), generator=generator)) for _ in range(2))
    defended = Defended(model, surrogate, num_points=count, normalise=False, seed=seed)
    found = attacked(defended, points, labels, delta, steps, generator)
    purified: Tensor = purifier(found, count, other)
    return purified
