"""The base of every purifier: checks input once, sets the frame, keeps the promised number of points."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ifdefense.arguments import MAX_POINTS, MAX_SEED, count_of, integer
from ifdefense.clouds import Clouds, unpack
from ifdefense.geometry.frame import Frame, first_occurrences, within_reach
from ifdefense.geometry.mesh import Mesh
from ifdefense.purifiers.specs import describe
from ifdefense.stages.repair import Repair
from ifdefense.timing import timed

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What a purifier made of one cloud.

    Attributes:
        points: ``(M, 3)`` the result.
        index: ``(M,)`` rows of the input, if the result is a choice among its points: these are then returned
            exactly as they came.
        kept: ``(N,)`` input points that an outlier filter kept; all by default.
        mesh: surface that was rebuilt.
        repair: what was done to it.
        fallback: why the surface was not used.
    """

    points: Tensor
    index: Tensor | None = None
    kept: Tensor | None = None
    mesh: Mesh | None = None
    repair: Repair | None = None
    fallback: str | None = None

    @classmethod
    def choice(cls, cloud: Tensor, index: Tensor, **fields: Any) -> Self:
        """The outcome that consists of the given rows of a cloud."""
        return cls(cloud[index], index, **fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """What each stage made of one cloud. Coordinates are in the caller's frame.

    Attributes:
        points: ``(N, 3)`` the cloud as it came.
        kept_mask: ``(N,)`` points that the outlier filter kept.
        mesh: reconstructed surface, ``None`` for methods without one or when there was none.
        score: ``(V,)`` anomaly score of the mesh's vertices.
        mask: ``(V,)`` vertices that were taken out as anomalous.
        repaired: the mesh after repair.
        purified: ``(M, 3)`` the result.
        fallback: why the filtered input was resampled in place of a surface, else ``None``.
        seconds: time of each stage, shared out evenly over the clouds of a batch.
    """

    points: NDArray[np.floating]
    kept_mask: NDArray[np.bool_]
    mesh: Mesh | None
    score: NDArray[np.float32] | None
    mask: NDArray[np.bool_] | None
    repaired: Mesh | None
    purified: NDArray[np.floating]
    fallback: str | None
    seconds: dict[str, float]

    @property
    def kept(self) -> NDArray[np.floating]:
        """``(K, 3)`` points that the outlier filter kept."""
        return self.points[self.kept_mask]


class Purifier(nn.Module, ABC):
    """Removes what an attacker did to point clouds.

    A subclass writes `run`, on clouds in the unit cube, and sets the fields below; the base checks and
    unpacks the input, moves it into the unit cube and back, and makes sure of the number of points.

    Attributes:
        name: name of the method.
        deterministic: whether the seed makes no difference.
        differentiable: whether gradients pass. If so, the input is neither detached nor are gradients
            disabled.
        normalise: whether a classifier wants the result centred and scaled to the unit sphere again.
    """

    name: str
    deterministic: bool = False
    differentiable: bool = False
    normalise: bool = True

    @abstractmethod
    def run(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """Purifies clouds in the unit cube.

        Args:
            clouds: ``(N_i, 3)`` float32, bounding box centred on 0 with longest side 1.
            counts: points wanted of each; ``None`` leaves the number to the purifier, for a part of a chain.
            seed: seed of every draw. The outcome of a cloud must not depend on the others.
        """

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path | None = None) -> Purifier:
        """A purifier by the name of its method, or the default pipeline around your own weights.

        Args:
            name_or_path: one of `ifdefense.purifiers.registry.METHODS`, the default method if not given; or a
                file of weights as ``ifdefense train`` writes it, or a public Occupancy Networks checkpoint,
                whose mesh is then repaired and sampled as ``"onet-mesh"`` does.

        Raises:
            ValueError: if there is neither a method nor a file of that name.
        """
        from ifdefense.purifiers.registry import build

        return build(name_or_path)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the weights to another device, but leaves them float32, as the clouds of `run` are.

        A purifier works behind a classifier of any precision: ``defended.half()`` does not touch it.
        """

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def spec(self) -> dict[str, Any]:
        """Everything that the result depends on, as a plain dictionary that `json` can write.

        `ifdefense.purifiers.specs.rebuild` makes the purifier again. Weights stand in it by their source and
        a digest.
        """
        return {"class": describe(type(self)), "name": self.name, "options": self.options()}

    def options(self) -> dict[str, Any]:
        """Arguments of the constructor, as `ifdefense.purifiers.specs.describe` writes them."""
        return {}

    @final
    def forward(
        self,
        points: Clouds,
        num_points: int | None = None,
        seed: int = 0,
        *,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Clouds:
        """Purifies clouds.

        Args:
            points: one cloud ``(N, 3)``, a batch ``(B, N, 3)``, or a list of clouds, NumPy or torch, in any
                frame and unit. Further columns are attributes: a kept point keeps them, a new one takes those
                of the nearest input point. PyTorch Geometric's ``Data`` and ``Batch`` are taken as well.
            num_points: points of each result; by default as many as came in.
            seed: seed of every draw; the result for a cloud does not depend on its batch.
            batch_size: clouds that are processed together. Memory grows with it, results do not change.
            progress: whether to show a progress bar.

        Returns:
            The same kind of array as ``points``, in the same frame, precision and on the same device.

        Raises:
            TypeError: if a cloud is no array of real numbers.
            ValueError: if a cloud cannot be used (the message names it), or an argument is out of range.
        """
        unpacked = unpack(points, detach=not self.differentiable)
        outcomes = self.outcomes(unpacked.clouds, num_points, seed, batch_size, progress)
        return unpacked.pack([each.points for each in outcomes], [each.index for each in outcomes])

    @final
    def trace(
        self, points: Clouds, num_points: int | None = None, seed: int = 0, *, batch_size: int = 16
    ) -> list[Trace]:
        """Purifies clouds and returns what every stage made of each; arguments and errors as `forward`."""
        clouds = unpack(points).clouds
        rest = iter(clouds)
        traces = []
        for outcomes, seconds in self._batches(clouds, num_points, seed, batch_size, progress=False):
            share = {stage: value / len(outcomes) for stage, value in seconds.items()}
            traces += [_trace(next(rest), outcome, share) for outcome in outcomes]
        return traces

    def outcomes(
        self,
        clouds: list[Tensor],
        num_points: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = False,
    ) -> list[Outcome]:
        """As `forward`, for clouds ``(N_i, 3)`` that `ifdefense.clouds.unpack` has checked."""
        parts = self._batches(clouds, num_points, seed, batch_size, progress)
        return [outcome for part, _ in parts for outcome in part]

    def _batches(
        self, clouds: list[Tensor], num_points: int | None, seed: int, batch_size: int, progress: bool
    ) -> Iterator[tuple[list[Outcome], dict[str, float]]]:
        """Outcomes in the caller's frame, batch by batch, with the time of each stage."""
        num_points, batch_size = count_of(num_points), integer("batch_size", batch_size, 1, MAX_POINTS)
        seed = integer("seed", seed, 0, MAX_SEED)
        gradients = self.differentiable and torch.is_grad_enabled()
        with tqdm(total=len(clouds), desc="purify", unit="cloud", disable=not progress) as bar:
            for start in range(0, len(clouds), batch_size):
                part = clouds[start : start + batch_size]
                counts = [num_points or len(cloud) for cloud in part]
                with torch.set_grad_enabled(gradients), timed() as seconds:
                    outcomes = self.restore(part, counts, seed)
                for index, (outcome, count) in enumerate(zip(outcomes, counts, strict=True), start):
                    if outcome.points.shape != (count, 3):
                        raise RuntimeError(
                            f"{self.name} returned {tuple(outcome.points.shape)} for cloud {index}, "
                            f"{count} points were asked for"
                        )
                    if outcome.fallback is not None:
                        logger.warning(
                            "cloud %d: %s, the filtered input is resampled", index, outcome.fallback
                        )
                yield outcomes, seconds
                bar.update(len(part))

    def restore(self, clouds: list[Tensor], counts: Sequence[int | None], seed: int) -> list[Outcome]:
        """Frame, `run`, and back: outcomes in the frame of the clouds.

        Exact copies of a point, such as padding, and points absurdly far away are left out before, see
        `ifdefense.geometry.frame.within_reach`: a few blind points do not set the frame.
        """
        used = [usable(cloud) for cloud in clouds]
        parts = [cloud[index] for cloud, index in zip(clouds, used, strict=True)]
        frames = [Frame.of(part) for part in parts]
        cubes = [frame.to_cube(part) for frame, part in zip(frames, parts, strict=True)]
        outcomes = self.run(cubes, counts, seed)
        return [_outward(*each) for each in zip(outcomes, frames, clouds, used, strict=True)]


def usable(cloud: Tensor) -> Tensor:
    """Rows of a cloud that can belong to the shape, each position once, ascending."""
    mask = first_occurrences(cloud)
    mask[mask.clone()] = within_reach(cloud[mask])
    return mask.nonzero().squeeze(1)


def _outward(outcome: Outcome, frame: Frame, cloud: Tensor, used: Tensor) -> Outcome:
    """An outcome of the rows ``used`` in the unit cube, as one of the whole cloud in its frame."""

    def moved(mesh: Mesh | None) -> Mesh | None:
        return None if mesh is None or mesh.is_empty else frame.mesh_from_cube(mesh)

    index = None if outcome.index is None else used[outcome.index]
    kept = torch.zeros(len(cloud), dtype=torch.bool, device=cloud.device)
    kept[used if outcome.kept is None else used[outcome.kept]] = True
    if index is not None:
        points = cloud[index]
    else:
        points = frame.from_cube(outcome.points, cloud.dtype).to(cloud.device)
    repair = outcome.repair
    if repair is not None:
        repair = dataclasses.replace(repair, mesh=moved(repair.mesh) or Mesh.empty())
    return Outcome(points, index, kept, moved(outcome.mesh), repair, outcome.fallback)


def _trace(cloud: Tensor, outcome: Outcome, seconds: dict[str, float]) -> Trace:
    repair, repaired = outcome.repair, outcome.mesh
    if repair is not None:
        repaired = None if repair.mesh.is_empty else repair.mesh
    kept = torch.ones(len(cloud), dtype=torch.bool) if outcome.kept is None else outcome.kept.cpu()
    return Trace(
        points=_array(cloud),
        kept_mask=kept.numpy(),
        mesh=outcome.mesh,
        score=None if repair is None else repair.score,
        mask=None if repair is None else repair.mask,
        repaired=repaired,
        purified=_array(outcome.points),
        fallback=outcome.fallback,
        seconds=seconds,
    )


def _array(points: Tensor) -> NDArray[np.floating]:
    values = points.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
