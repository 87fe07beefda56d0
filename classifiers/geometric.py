"""Networks of PyTorch Geometric as classifiers of ``(B, N, 3)`` points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ifdefense.logits import classify


class FromGeometric(nn.Module):
    """Calls a network of PyTorch Geometric with a ``Batch`` of clouds; see `from_geometric`.

    Args:
        model: the network.
        transform: applied to the ``Data`` of each cloud.

    Examples:
        >>> from torch_geometric.nn import global_mean_pool
        >>> FromGeometric(lambda data: global_mean_pool(data.pos, data.batch))(points).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: Callable[[Any], Any], transform: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.model, self.transform = model, transform
        self.up_axis = getattr(model, "up_axis", None)

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(B, C)`` of clouds ``(B, N, 3 + C)``; gradients pass to the points."""
        from torch_geometric.data import Batch, Data

        clouds = [Data(pos=cloud[:, :3]) for cloud in points]
        if points.shape[-1] > 3:
            for data, cloud in zip(clouds, points, strict=True):
                data.x = cloud[:, 3:]
        if self.transform is not None:
            clouds = [self.transform(data) for data in clouds]
        return classify(self.model, Batch.from_data_list(clouds))


def from_geometric(
    model: Callable[[Any], Any], transform: Callable[[Any], Any] | None = None
) -> FromGeometric:
    """A classifier of ``(B, N, 3)`` points from a network of PyTorch Geometric, for attacks and benchmarks.

    Args:
        model: takes a ``Batch`` with positions ``pos`` and returns ``(B, C)`` logits, or another output that
            `ifdefense.logits.classify` supports. Further columns of the points are its features ``x``.
        transform: applied to the ``Data`` of each cloud at every call, such as
            `ifdefense.transforms.KNNGraph`, for networks that need edges.

    Raises:
        TypeError: if an argument cannot be called.
        ImportError: if PyTorch Geometric is not installed.

    Examples:
        >>> from torch_geometric.nn import global_max_pool
        >>> model = classifiers.from_geometric(lambda data: global_max_pool(data.pos, data.batch))
        >>> model(points).shape
        torch.Size([2, 3])
    """
    for name, part in (("model", model), ("transform", transform)):
        if part is not None and not callable(part):
            raise TypeError(f"{name} must be callable, got {type(part).__name__}")
    try:
        import torch_geometric  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "from_geometric needs PyTorch Geometric: pip install torch-geometric", name="torch_geometric"
        ) from error
    return FromGeometric(model, transform)
