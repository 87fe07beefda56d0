"""A classifier behind a purifier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ifdefense.arguments import MAX_SEED, count_of, integer, seed_of
from ifdefense.clouds import Clouds, is_geometric, tensors
from ifdefense.geometry.frame import to_unit_sphere


class Defended(nn.Module):
    """A classifier behind a purifier, again a classifier. Gradients pass if the purifier is differentiable.

    Unless it is given a seed, every call draws a fresh one from the system's entropy, so that an attacker
    cannot prepare for the draws of a random purifier.

    Args:
        classifier: ``(B, N, 3)`` clouds → ``(B, classes)`` logits. Called with PyTorch Geometric's ``Batch``,
            it is one for these.
        purifier: what each cloud passes first, an `ifdefense.Purifier`, or a callable that takes
            ``(points, num_points, seed)``.
        num_points: points that the classifier sees; by default as many as came in.
        normalise: whether purified clouds are centred on their mean and scaled to largest norm 1 again, as in
            IF-Defense; by default what the purifier says. Turn it off for a classifier that was not trained
            on such clouds.
        seed: seed of the purifier's draws, which makes calls reproducible; ``None`` draws a fresh one in each
            call.
        draws: purifications whose logits are averaged. A deterministic purifier is called once.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Callable[..., Any],
        *,
        num_points: int | None = None,
        normalise: bool | None = None,
        seed: int | None = None,
        draws: int = 1,
    ) -> None:
        super().__init__()
        for name, part in (("classifier", classifier), ("purifier", purifier)):
            if not callable(part):
                raise TypeError(f"{name} must be callable, got {type(part).__name__}")
        self.classifier = classifier
        self.purifier = purifier
        self.num_points = count_of(num_points)
        self.normalise = bool(getattr(purifier, "normalise", True)) if normalise is None else normalise
        self.seed = None if seed is None else seed_of(seed)
        self.draws = integer("draws", draws, 1)

    def seeds(self) -> list[int]:
        """Seeds of the draws of one call: ``seed``, ``seed + 1``, …, or fresh ones."""
        draws = 1 if getattr(self.purifier, "deterministic", False) else self.draws
        if self.seed is None:
            return [seed_of(None) for _ in range(draws)]
        return [(self.seed + draw) % (MAX_SEED + 1) for draw in range(draws)]

    def forward(self, points: Clouds) -> Tensor:
        """Logits of clouds.

        Args:
            points: a batch ``(B, N, 3)``, one cloud ``(N, 3)``, or a list of clouds, NumPy or torch. Further
                columns are handed to the classifier as they are. Or PyTorch Geometric's ``Data`` or
                ``Batch``.

        Returns:
            ``(B, classes)``, or ``(classes,)`` for one cloud, on the classifier's device.
        """
        given = tensors(points)
        first, *rest = [self._logits(given, seed) for seed in self.seeds()]
        return sum(rest, first) / (1 + len(rest)) if rest else first

    def _logits(self, points: Any, seed: int) -> Tensor:
        clean = self.purifier(points, self.num_points, seed)
        if isinstance(clean, list):
            if len({cloud.shape for cloud in clean if isinstance(cloud, Tensor)}) == 1:
                return self._classified(torch.stack(clean))
            return torch.cat(
                [self._classified(cloud if is_geometric(cloud) else cloud[None]) for cloud in clean]
            )
        if is_geometric(clean) or clean.ndim == 3:
            return self._classified(clean)
        return self._classified(clean[None])[0]

    def _classified(self, clean: Any) -> Tensor:
        if is_geometric(clean):
            clean = copy.copy(clean)
            clean.pos = self._normalised_parts(clean.pos, getattr(clean, "batch", None))
            clean = clean.to(self._like(clean.pos).device)
        else:
            points, columns = clean[..., :3], clean[..., 3:]
            points = to_unit_sphere(points) if self.normalise else points
            clean = self._like(torch.cat([points, columns], -1) if columns.shape[-1] else points)
        logits: Tensor = self.classifier(clean)
        return logits

    def _normalised_parts(self, positions: Tensor, batch: Tensor | None) -> Tensor:
        """Positions of several clouds, each normalised by itself, in the classifier's precision."""
        if self.normalise and batch is not None:
            sizes = torch.bincount(batch).tolist()
            positions = torch.cat([to_unit_sphere(cloud) for cloud in positions.split(sizes)])
        elif self.normalise:
            positions = to_unit_sphere(positions)
        return self._like(positions)

    def _like(self, values: Tensor) -> Tensor:
        """Values in the precision and on the device of the classifier."""
        if isinstance(self.classifier, nn.Module):
            for weight in self.classifier.parameters():
                if weight.is_floating_point():
                    return values.to(weight)
        return values
