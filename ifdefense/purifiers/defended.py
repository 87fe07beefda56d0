"""A classifier behind a purifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ifdefense.arguments import MAX_SEED, count_of, integer, seed_of
from ifdefense.clouds import Clouds, tensors
from ifdefense.geometry.axes import UP, axis_of, trained_axis, turned
from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.logits import classify, placed
from ifdefense.structures.registry import adapter_of


class Defended(nn.Module):
    """Classifier behind a purifier. Gradients propagate if the purifier is differentiable.

    A call runs `purified`, then `classified`, for each draw. Both can be called separately, for example to
    store purified clouds.

    Without a seed, each call draws one from the system's entropy, so that attackers cannot predict it.

    Args:
        classifier: ``(B, N, 3)`` clouds → ``(B, classes)`` logits; for inputs of PyTorch Geometric it is
            called with a ``Batch``. For other supported outputs see `ifdefense.logits.classify`.
        purifier: an `ifdefense.Purifier`, or a callable with arguments ``(points, num_points, seed)``.
        num_points: points per purified cloud; by default as in the input.
        normalise: normalise purified clouds to the unit sphere (mean 0, maximum norm 1), as in IF-Defense; by
            default `Purifier.normalise`. Disable it for classifiers trained without this normalisation.
        seed: random seed of the purifier for reproducible calls; ``None`` draws one per call.
        draws: number of purifications whose logits are averaged; 1 if the purifier is deterministic.
        up: up axis of the points, z by default. For a classifier with another up axis in its attribute
            ``up_axis``, such as those of `classifiers.load`, clouds are rotated to it.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range.

    Examples:
        >>> model = ifdefense.Defended(classifier, ifdefense.load("sor"), seed=0)
        >>> model(points).shape
        torch.Size([2, 4])
    """

    places_clouds = True
    """See `ifdefense.logits.classify`."""

    def __init__(
        self,
        classifier: Callable[[Any], Any],
        purifier: Callable[..., Any],
        *,
        num_points: int | None = None,
        normalise: bool | None = None,
        seed: int | None = None,
        draws: int = 1,
        up: str | None = None,
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
        self.up = None if up is None else axis_of(up)

    def seeds(self, points: Any = None) -> list[int]:
        """Seeds of one call, independent of its points: ``seed``, ``seed + 1``, …, or new ones."""
        draws = 1 if getattr(self.purifier, "deterministic", False) else self.draws
        if self.seed is None:
            return [seed_of(None) for _ in range(draws)]
        return [(self.seed + draw) % (MAX_SEED + 1) for draw in range(draws)]

    def forward(self, points: Clouds) -> Tensor:
        """Classifies purified clouds.

        Args:
            points: a batch ``(B, N, 3)``, one cloud ``(N, 3)``, or a list of clouds, NumPy or torch. Further
                columns are passed on to the classifier. Also structures as in `ifdefense.purify`, of which
                the classifier gets the positions; those of PyTorch Geometric are passed on as a whole.

        Returns:
            ``(B, classes)``, or ``(classes,)`` for one cloud, on the classifier's device.
        """
        given = tensors(points)
        draws = [self.classified(self.purified(given, seed)) for seed in self.seeds(given)]
        first, *rest = draws
        return sum(rest, first) / len(draws) if rest else first

    def purified(self, points: Any, seed: int) -> Any:
        """Purified clouds, in the frame of the input."""
        axis = {} if self.up is None else {"up": self.up}  # other callables need not support it
        return self.purifier(points, self.num_points, seed, **axis)

    def classified(self, clean: Any) -> Tensor:
        """Logits, as returned by `forward`, of the results of `purified`."""
        given = self._prepared(clean)
        if isinstance(given, list):
            parts = [part[None] if isinstance(part, Tensor) else part for part in given]
            return torch.cat([classify(self.classifier, part) for part in parts])
        if isinstance(given, Tensor) and given.ndim == 2:
            return classify(self.classifier, given[None])[0]
        return classify(self.classifier, given)

    def _prepared(self, clean: Any) -> Any:
        """Inputs of the classifier: rotated to its axis, normalised, in its dtype and on its device."""
        if isinstance(clean, list):
            if len({getattr(part, "shape", None) for part in clean}) == 1 and isinstance(clean[0], Tensor):
                return self._prepared(torch.stack(clean))
            parts = map(self._prepared, clean)
            return [each for part in parts for each in (part if isinstance(part, list) else [part])]
        if (adapter := adapter_of(clean)) is not None:
            return adapter.inputs(clean, self._prepared)
        points, columns = self._turned(clean[..., :3]), clean[..., 3:]
        points = to_unit_sphere(points) if self.normalise else points
        return placed(self.classifier, torch.cat([points, columns], -1) if columns.shape[-1] else points)

    def _turned(self, points: Tensor) -> Tensor:
        """Rotates points to the up axis of the classifier, if it has one."""
        up = self.up or UP
        return turned(points, up, trained_axis(self.classifier) or up)
