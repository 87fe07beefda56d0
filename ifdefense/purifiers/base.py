"""Base class of purifiers: checks input, normalises clouds, and verifies the number of points."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
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
from ifdefense.devices import on_device, on_host
from ifdefense.geometry.axes import UP, axis_of, turned, turned_mesh
from ifdefense.geometry.frame import Frame, first_occurrences, within_reach
from ifdefense.geometry.mesh import Mesh
from ifdefense.guard import guarded, normal
from ifdefense.purifiers.packing import packed, unpack_into
from ifdefense.purifiers.saving import save
from ifdefense.purifiers.specs import describe
from ifdefense.stages.repair import Repair
from ifdefense.threads import parallel_map, workers
from ifdefense.timing import timed

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """Result of a purifier for one cloud.

    Attributes:
        points: ``(M, 3)`` purified points.
        index: ``(M,)`` rows of the input if the result is a selection of input points, which are then
            returned exactly.
        kept: ``(N,)`` mask of points kept by an outlier filter; all by default.
        mesh: reconstructed surface.
        repair: changes made by the mesh repair.
        fallback: reason why the surface was not used.

    Examples:
        >>> outcome = Outcome.choice(points[0], torch.tensor([3, 5]))
        >>> torch.equal(outcome.points, points[0][[3, 5]])
        True
    """

    points: Tensor
    index: Tensor | None = None
    kept: Tensor | None = None
    mesh: Mesh | None = None
    repair: Repair | None = None
    fallback: str | None = None

    @classmethod
    def choice(cls, cloud: Tensor, index: Tensor, **fields: Any) -> Self:
        """Outcome of a selection of rows of a cloud."""
        return cls(cloud[index], index, **fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Intermediate results of every stage for one cloud, in the caller's frame.

    Attributes:
        points: ``(N, 3)`` input.
        kept_mask: ``(N,)`` points kept by the outlier filter.
        mesh: reconstructed surface, ``None`` if there is none.
        score: ``(V,)`` anomaly score of the mesh's vertices.
        mask: ``(V,)`` vertices removed or moved as anomalous.
        repaired: mesh after repair.
        purified: ``(M, 3)`` result.
        fallback: reason why the filtered input was resampled instead of a surface, else ``None``.
        seconds: time per stage, divided evenly over the clouds of a batch.

    Examples:
        >>> trace = ifdefense.load("onet-mesh").trace(points)[0]
        >>> trace.mesh.is_watertight, trace.purified.shape
        (True, (64, 3))
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
        """``(K, 3)`` points kept by the outlier filter."""
        return self.points[self.kept_mask]


class Purifier(nn.Module, ABC):
    """Base class of purifiers.

    Subclasses implement `run` on clouds in the unit cube and set the attributes below. The base class checks
    and unpacks the input, moves it to the device of the weights, normalises it to the unit cube and back, and
    verifies the number of points. Purifiers are independent of the caller's PyTorch settings
    (`ifdefense.guard`) and always in evaluation mode.

    Attributes:
        name: name of the method.
        deterministic: whether results are independent of the seed.
        differentiable: whether gradients can propagate; they do if the input requires them.
        normalise: whether results should be normalised to the unit sphere before classification.

    Examples:
        >>> class Centred(ifdefense.Purifier):
        ...     name = "centred"
        ...     def run(self, clouds, counts, seed):
        ...         return [Outcome(cloud - cloud.mean(0)) for cloud in clouds]
        >>> Centred()(points).shape
        torch.Size([2, 64, 3])
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
            counts: points per result; ``None``, used within chains, lets the purifier choose the number;
                selections of input points then contain no duplicates.
            seed: random seed. The outcome of a cloud must not depend on the others.
        """

    @guarded  # weights moved in inference mode would pass no gradients afterwards
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the weights between devices but keeps them float32, e.g. in ``defended.half()``."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, even as part of a model in training."""
        return super().train(False)

    def __getstate__(self) -> tuple[dict[str, Any], bytes | None]:
        return packed(self)

    def __setstate__(self, state: tuple[dict[str, Any], bytes | None]) -> None:
        attributes, data = state
        super().__setstate__(attributes)  # type: ignore[no-untyped-call]
        if data is not None:
            unpack_into(self, data)

    def __copy__(self) -> Self:
        result = type(self).__new__(type(self))
        vars(result).update(vars(self))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = result = type(self).__new__(type(self))
        vars(result).update(copy.deepcopy(vars(self), memo))
        return result

    def spec(self) -> dict[str, Any]:
        """JSON-serialisable description of everything that affects results.

        Weights are described by source and digest. `ifdefense.purifiers.specs.rebuild` rebuilds the purifier.
        """
        return {"class": describe(type(self)), "name": self.name, "options": self.options()}

    def save(self, folder: str | Path) -> None:
        """Saves the purifier with its options and weights, for `ifdefense.load`; what is loaded is equal.

        Args:
            folder: a new or an empty folder, for ``purifier.json`` and ``weights.safetensors``.

        Raises:
            FileExistsError: if there is something in its place already.
            TypeError: if a part cannot be described by its options, or is defined in a function or script.

        Examples:
            >>> ifdefense.load("srs").save("my-defence")
            >>> ifdefense.load("my-defence").name
            'srs'
        """
        save(self, folder)

    def options(self) -> dict[str, Any]:
        """Arguments of the constructor, in the form of `ifdefense.purifiers.specs.describe`.

        Taken from the attributes of the same names; subclasses with other attributes override this.

        Raises:
            TypeError: if an argument has no such attribute, or cannot be described.
        """
        options = {}
        for name in _arguments(type(self)):
            if not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} does not keep its argument {name!r} as an attribute")
            options[name] = describe(getattr(self, name))
        return options

    @final  # type: ignore[misc]  # nn.Module declares `forward` as an attribute
    @guarded
    def forward(
        self,
        points: Clouds,
        num_points: int | None = None,
        seed: int = 0,
        *,
        batch_size: int = 16,
        progress: bool = False,
        up: str | None = None,
    ) -> Clouds:
        """Purifies clouds.

        Args:
            points: one cloud ``(N, 3)``, a batch ``(B, N, 3)``, or a list of clouds, NumPy or torch, in any
                frame and unit. Further columns are attributes: kept points keep them, new ones take those of
                the nearest input point. Also structures of PyTorch Geometric, PyTorch3D and trimesh, see
                `ifdefense.purify`.
            num_points: points per result; by default as in the input.
            seed: random seed; results do not depend on the batch.
            batch_size: clouds processed together; affects memory and speed only.
            progress: show a progress bar.
            up: up axis of the points, one of `ifdefense.geometry.axes.AXES`; z by default. For networks that
                depend on the orientation, clouds are rotated to their up axis and results are rotated back.

        Returns:
            The same kind of array as ``points``, in the same frame, precision and on the same device. It
            requires gradients if ``points`` do and the purifier is differentiable; if it is not, a warning is
            logged.

        Raises:
            TypeError: if a cloud is not an array of real numbers.
            ValueError: if a cloud is unusable (the message names it), or an argument is out of range.
        """
        unpacked = unpack(points, num_points, seed)
        wanted = torch.is_grad_enabled() and any(cloud.requires_grad for cloud in unpacked.clouds)
        if wanted and not self.differentiable:
            logger.warning(
                "%s is not differentiable, so its result requires no gradients though the points do; "
                "attacks.DefenceAware passes approximate ones",
                self.name,
            )
        outcomes = self.outcomes(unpacked.clouds, num_points, seed, batch_size, progress, up)
        return unpacked.pack([each.points for each in outcomes], [each.index for each in outcomes])

    @final
    @guarded
    def trace(
        self,
        points: Clouds,
        num_points: int | None = None,
        seed: int = 0,
        *,
        batch_size: int = 16,
        up: str | None = None,
    ) -> list[Trace]:
        """Purifies clouds and returns intermediate results; arguments and errors as `forward`.

        Examples:
            >>> trace = ifdefense.load("sor").trace(points)[0]
            >>> bool(trace.kept_mask.all()), trace.purified.shape
            (False, (64, 3))
        """
        clouds = [cloud.detach() for cloud in unpack(points, num_points, seed).clouds]
        rest = iter(clouds)
        traces = []
        for outcomes, seconds in self._batches(clouds, num_points, seed, batch_size, up=up, traced=True):
            share = {stage: value / len(outcomes) for stage, value in seconds.items()}
            traces += [_trace(next(rest), outcome, share) for outcome in outcomes]
        return traces

    @guarded
    def outcomes(
        self,
        clouds: list[Tensor],
        num_points: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        progress: bool = False,
        up: str | None = None,
    ) -> list[Outcome]:
        """As `forward`, for clouds ``(N_i, 3)`` checked by `ifdefense.clouds.unpack`."""
        parts = self._batches(clouds, num_points, seed, batch_size, up=up, progress=progress)
        return [outcome for part, _ in parts for outcome in part]

    def _batches(
        self,
        clouds: list[Tensor],
        num_points: int | None,
        seed: int,
        batch_size: int,
        *,
        up: str | None,
        progress: bool = False,
        traced: bool = False,
    ) -> Iterator[tuple[list[Outcome], dict[str, float]]]:
        """Yields the outcomes of each batch in the caller's frame, if ``traced`` with the time per stage."""
        num_points, batch_size = count_of(num_points), integer("batch_size", batch_size, 1, MAX_POINTS)
        seed = integer("seed", seed, 0, MAX_SEED)
        up = UP if up is None else axis_of(up)
        with tqdm(total=len(clouds), desc="purify", unit="cloud", disable=not progress) as bar:
            for start in range(0, len(clouds), batch_size):
                given = self._beside_weights(clouds[start : start + batch_size])
                part = [turned(cloud, up) for cloud in given]
                counts = [num_points or len(cloud) for cloud in part]
                # Without tracing, stages do not synchronise the accelerator.
                clock = timed(part[0].device) if traced else contextlib.nullcontext(dict[str, float]())
                with torch.set_grad_enabled(self._passes_gradients(part)), clock as seconds:
                    outcomes, threads = self._restored(part, counts, seed)
                outcomes = [_returned(*each) for each in zip(outcomes, clouds[start:], strict=False)]
                for index, (outcome, count) in enumerate(zip(outcomes, counts, strict=True), start):
                    if outcome.points.shape != (count, 3):
                        raise RuntimeError(
                            f"{self.name} returned {tuple(outcome.points.shape)} for cloud {index}, "
                            f"{count} points were requested"
                        )
                    if outcome.fallback is not None:
                        logger.warning(
                            "cloud %d: %s, the filtered input is resampled", index, outcome.fallback
                        )
                outcomes = [_turned_back(outcome, up) for outcome in outcomes]
                yield outcomes, {stage: value / threads for stage, value in seconds.items()}
                bar.update(len(part))

    def _beside_weights(self, clouds: Sequence[Tensor]) -> list[Tensor]:
        """Clouds on the device of the weights, or of the first cloud if there are no weights."""
        place = next(itertools.chain(self.parameters(), self.buffers(), clouds)).device
        return [normal(cloud.to(place)) for cloud in clouds]

    def _passes_gradients(self, clouds: Sequence[Tensor]) -> bool:
        """Whether gradients of the result may be needed."""
        inputs = itertools.chain(clouds, self.parameters())
        return self.differentiable and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def _restored(self, clouds: list[Tensor], counts: Sequence[int], seed: int) -> tuple[list[Outcome], int]:
        """Runs `restore`, in parallel on a CPU; also returns the number of threads."""
        if torch.is_grad_enabled() or any(cloud.device.type != "cpu" for cloud in clouds):
            return self.restore(clouds, counts, seed), 1
        size = -(-len(clouds) // workers())
        shares = [slice(start, start + size) for start in range(0, len(clouds), size)]
        parts = parallel_map(lambda share: self.restore(clouds[share], counts[share], seed), shares)
        return [outcome for part in parts for outcome in part], len(shares)

    def restore(
        self, clouds: list[Tensor], counts: Sequence[int | None], seed: int, distinct: bool = False
    ) -> list[Outcome]:
        """Normalises clouds, calls `run`, and returns outcomes in the frame of the clouds.

        Duplicates, such as padding, and extreme outliers (`ifdefense.geometry.frame.within_reach`) are
        removed first, so that they do not affect the frame. ``distinct`` states that there are no duplicates.
        """
        given = self._beside_weights(clouds)
        hosts = on_host(given)
        rows = [usable(cloud, distinct) for cloud in hosts]
        used = on_device(rows, given[0].device)
        parts = [cloud[index] for cloud, index in zip(given, used, strict=True)]
        frames = [Frame.of(part) for part in parts]
        cubes = [frame.to_cube(part) for frame, part in zip(frames, parts, strict=True)]
        if given[0].device.type != "cpu":  # meshes and checks are on the host
            frames = [
                dataclasses.replace(frame, host=Frame.of(cloud[index]))
                for frame, cloud, index in zip(frames, hosts, rows, strict=True)
            ]
        outcomes = self.run(cubes, counts, seed)
        outward = [_outward(*each) for each in zip(outcomes, frames, given, used, strict=True)]
        return [_returned(*each) for each in zip(outward, clouds, strict=True)]


def _arguments(cls: type[Purifier]) -> list[str]:
    """Names of the arguments of a constructor."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # defined by nn.Module
    return [each.name for each in inspect.signature(cls).parameters.values() if each.kind not in several]


def usable(cloud: Tensor, distinct: bool = False) -> Tensor:
    """Ascending rows of a cloud without duplicates and extreme outliers."""
    if distinct:
        return within_reach(cloud).nonzero().squeeze(1)
    mask = first_occurrences(cloud)
    mask[mask.clone()] = within_reach(cloud[mask])
    return mask.nonzero().squeeze(1)


def _outward(outcome: Outcome, frame: Frame, cloud: Tensor, used: Tensor) -> Outcome:
    """Maps an outcome of the rows ``used`` in the unit cube to the whole cloud in its frame."""

    def moved(mesh: Mesh | None) -> Mesh | None:
        return None if mesh is None or mesh.is_empty else frame.mesh_from_cube(mesh)

    index = None if outcome.index is None else used[outcome.index]
    kept = torch.zeros(len(cloud), dtype=torch.bool, device=cloud.device)
    kept[used] = torch.ones_like(used, dtype=torch.bool) if outcome.kept is None else outcome.kept
    if index is not None:
        points = cloud[index]
    else:
        points = frame.from_cube(outcome.points, cloud.dtype).to(cloud.device)
    repair = outcome.repair
    if repair is not None:
        repair = dataclasses.replace(repair, mesh=moved(repair.mesh) or Mesh.empty())
    return Outcome(points, index, kept, moved(outcome.mesh), repair, outcome.fallback)


def _returned(outcome: Outcome, cloud: Tensor) -> Outcome:
    """Moves an outcome to the device of its cloud."""

    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(cloud.device)

    return dataclasses.replace(
        outcome,
        points=outcome.points.to(cloud.device),
        index=moved(outcome.index),
        kept=moved(outcome.kept),
    )


def _turned_back(outcome: Outcome, up: str) -> Outcome:
    """Rotates an outcome from the library's frame to clouds with another up axis."""
    if up == UP:
        return outcome
    repair, mesh = outcome.repair, outcome.mesh
    return dataclasses.replace(
        outcome,
        points=turned(outcome.points, UP, up),
        mesh=None if mesh is None else turned_mesh(mesh, UP, up),
        repair=repair and dataclasses.replace(repair, mesh=turned_mesh(repair.mesh, UP, up)),
    )


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
