"""Classifiers with another up axis, for clouds with z up."""

from __future__ import annotations

from torch import Tensor, nn

from ifdefense.geometry.axes import UP, trained_axis, turned


class Upright(nn.Module):
    """Rotates clouds ``(B, N, 3)`` with z up to the axis of a classifier, and classifies them.

    Args:
        model: the classifier.
        up: its up axis.

    Examples:
        >>> Upright(classifier, "y")(points).shape
        torch.Size([2, 4])
    """

    def __init__(self, model: nn.Module, up: str) -> None:
        super().__init__()
        self.model, self.up = model, up

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(B, C)``."""
        logits: Tensor = self.model(turned(points, UP, self.up))
        return logits


def upright(model: nn.Module) -> nn.Module:
    """A classifier for clouds with z up: ``model`` itself unless its ``up_axis`` differs.

    Examples:
        >>> classifier.up_axis = "y"
        >>> model = classifiers.upright(classifier)  # for clouds with z up
        >>> model(points).shape
        torch.Size([2, 4])
    """
    up = trained_axis(model)
    return model if up in (None, UP) else Upright(model, up)
