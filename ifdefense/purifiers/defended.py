"""A classifier behind a purifier."""

from __future__ import annotations

from torch import Tensor, nn

from ifdefense.geometry.frame import to_unit_sphere
from ifdefense.purifiers.base import Purifier


class Defended(nn.Module):
    """A classifier behind a purifier, again a classifier. Gradients pass if the purifier is differentiable.

    Args:
        classifier: ``(B, N, 3)`` clouds → ``(B, classes)`` logits.
        purifier: what each cloud passes first.
        num_points: points that the classifier sees; by default as many as came in.
        normalise: whether purified clouds are centred on their mean and scaled to largest norm 1 again, as in
            IF-Defense; by default what the purifier says. Turn it off for a classifier that was not trained
            on such clouds.
        seed: seed of the purifier's draws.
    """

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Purifier,
        *,
        num_points: int | None = None,
        normalise: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.purifier = purifier
        self.num_points = num_points
        self.normalise = purifier.normalise if normalise is None else normalise
        self.seed = seed

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of clouds ``(B, N, 3)``."""
        clean = self.purifier(points, self.num_points, self.seed)
        logits: Tensor = self.classifier(to_unit_sphere(clean) if self.normalise else clean)
        return logits
