"""The defence as a whole: a cloud goes in, passes every stage, and comes out clean in its own frame.

frame → outliers → implicit function → field to mesh → mesh repair → resampling → back to the caller's frame,
as IF-Defense's ONet-Mesh (Wu et al., 2020, https://arxiv.org/abs/2010.05272) with the repair of the mesh
added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from ifdefense.checkpoints import load_into, load_state, shipped
from ifdefense.clouds import Clouds, unpack
from ifdefense.geometry.frame import Frame, to_unit_sphere
from ifdefense.geometry.mesh import Floats, Mesh
from ifdefense.implicit.occupancy import OccupancyConfig, OccupancyNetwork
from ifdefense.stages.extraction import ExtractionOptions, extract_meshes
from ifdefense.stages.outliers import simple_random_sampling, statistical_outlier_removal
from ifdefense.stages.repair import Repair, RepairOptions, repair_mesh
from ifdefense.stages.resampling import Method as Resampling
from ifdefense.stages.resampling import resample, resample_with_evidence

logger = logging.getLogger(__name__)

METHODS = ("onet-mesh", "sor", "srs")
"""What :func:`purify` and :meth:`Purifier.from_pretrained` know by name."""

OutlierFilter = Callable[..., Tensor]
"""``(B, N, 3)`` clouds → ``(B, N)`` mask of the points that stay; one that takes a ``seed`` is given one."""


@dataclasses.dataclass(frozen=True)
class SurfaceOptions:
    """How the surface is rebuilt; lengths in the unit-cube frame.

    The published threshold of 0.2 belongs to networks trained on uniform queries; half of ours lie near the
    surface, where every second one is inside, and 0.5 gives the smallest Chamfer distance on validation
    clouds.

    Attributes:
        points: points of a cloud that the encoder sees at once.
        views: disjoint subsets of that many points whose codes are averaged, as far as the cloud has them.
        offset: thickening that the network was trained with; samples are moved back by it along the normals.
        extraction: field to mesh.
        second_threshold: level of a second try where the first shows no surface, as happens to thin shapes;
            ``None`` for no second try.
        repair: removal of anomalous deformation, ``None`` to leave the mesh as it is.
        resampling: how the mesh is sampled.
        tolerance: input points within this distance of the surface stand in the result and samples of the
            mesh fill in where there are none; ``None`` samples the mesh alone, as IF-Defense does.
        smoothing: those input points are moved to the mean of this many nearest ones, themselves included,
            which takes back shifts that were made point by point; 1 leaves them where they are.
    """

    points: int = 300
    views: int = 3
    offset: float = 0.015
    extraction: ExtractionOptions = ExtractionOptions(box=1.2, threshold=0.5)
    second_threshold: float | None = 0.2
    repair: RepairOptions | None = RepairOptions()
    resampling: Resampling = "farthest"
    tolerance: float | None = 0.3
    smoothing: int = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """What each stage made of one cloud. Coordinates are in the caller's frame.

    Attributes:
        points: ``(N, 3)`` the cloud as it came.
        kept_mask: ``(N,)`` points that the outlier filter left in.
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
        """``(K, 3)`` points that the outlier filter left in."""
        return self.points[self.kept_mask]


@dataclasses.dataclass(eq=False)
class _Passage:
    """One cloud on its way through the stages."""

    index: int  # among the caller's clouds
    cloud: Tensor
    count: int
    kept: Tensor
    frame: Frame
    evidence: Tensor  # kept points, unit cube
    mesh: Mesh | None = None
    repair: Repair | None = None
    purified: Tensor | None = None
    fallback: str | None = None


class Stopwatch:
    """Adds up the time of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts the time of the block towards a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Purifier(nn.Module):
    """Removes what an attacker did to a cloud.

    Args:
        network: implicit function that rebuilds the surface; without one the filtered points are the result.
        outliers: filter in front of it.
        options: how the surface is rebuilt.
        batch_size: clouds that go through the network together; memory grows with it, results do not change.
    """

    def __init__(
        self,
        network: OccupancyNetwork | None = None,
        *,
        outliers: OutlierFilter = statistical_outlier_removal,
        options: SurfaceOptions = SurfaceOptions(),
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.network = network
        self.outliers = outliers
        self._outliers_draw = "seed" in inspect.signature(outliers).parameters
        self.options = options
        self.batch_size = batch_size
        self.eval()

    @classmethod
    def from_pretrained(cls, name: str = "onet-mesh") -> Purifier:
        """A purifier by the name of its method, with the weights that travel with the package.

        Args:
            name: ``"onet-mesh"`` (Occupancy Network, mesh, repair), or a baseline: ``"sor"`` (statistical
                outlier removal), ``"srs"`` (simple random sampling, 500 of 1,024 points dropped, in
                proportion for others).

        Raises:
            ValueError: for any other name.
        """
        if name == "sor":
            return cls()
        if name == "srs":
            return cls(outliers=_published_sampling)
        if name == "onet-mesh":
            path = shipped("ifdefense", "onet")
            state = load_state(path)
            network = OccupancyNetwork(OccupancyConfig.of_state(state))
            load_into(network, state, path)
            return cls(network)
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")

    def extra_repr(self) -> str:
        """Settings for ``repr``."""
        return f"options={self.options}, batch_size={self.batch_size}"

    def forward(
        self, points: Clouds, num_points: int | None = None, seed: int = 0, progress: bool = False
    ) -> Clouds:
        """Purifies clouds; see :func:`purify`."""
        unpacked = unpack(points)
        results = [
            passage.purified
            for passages, _ in self._batches(unpacked.clouds, num_points, seed, progress)
            for passage in passages
            if passage.purified is not None
        ]
        return unpacked.pack(results)

    def trace(self, points: Clouds, num_points: int | None = None, seed: int = 0) -> list[Trace]:
        """Purifies clouds and returns what every stage made of each.

        Args:
            points: as for :func:`purify`; a single cloud gives a list of one.
            num_points: points of the result, as many as came in by default.
            seed: seed of every draw.
        """
        traces = []
        for passages, seconds in self._batches(unpack(points).clouds, num_points, seed, progress=False):
            share = {stage: value / len(passages) for stage, value in seconds.items()}
            traces += [_trace(passage, share) for passage in passages]
        return traces

    def _batches(
        self, clouds: list[Tensor], num_points: int | None, seed: int, progress: bool
    ) -> Iterator[tuple[list[_Passage], dict[str, float]]]:
        """Takes the clouds through the stages, batch by batch, with the time of each stage."""
        if num_points is not None and num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {num_points}")
        with tqdm(total=len(clouds), desc="purify", unit="cloud", disable=not progress) as bar:
            for start in range(0, len(clouds), self.batch_size):
                part = clouds[start : start + self.batch_size]
                watch = Stopwatch()
                with torch.no_grad():
                    yield self._purify(part, start, num_points, seed, watch), watch.seconds
                bar.update(len(part))

    def _purify(
        self, clouds: list[Tensor], start: int, num_points: int | None, seed: int, watch: Stopwatch
    ) -> list[_Passage]:
        with watch("outliers"):
            passages = [
                self._filter(index, cloud, num_points, seed) for index, cloud in enumerate(clouds, start)
            ]
        if self.network is not None:
            self._rebuild(self.network, passages, seed, watch)
        with watch("resampling"):
            self._sample(passages, seed)
        return passages

    def _filter(self, index: int, cloud: Tensor, num_points: int | None, seed: int) -> _Passage:
        """Frame and outlier filter: the frame of the surface is that of the points that stay."""
        draw = {"seed": seed} if self._outliers_draw else {}
        kept = self.outliers(Frame.of(cloud).to_cube(cloud)[None], **draw)[0]
        if len(torch.unique(cloud[kept], dim=0)) < 2:
            kept = torch.ones_like(kept)
        frame = Frame.of(cloud[kept])
        return _Passage(index, cloud, num_points or len(cloud), kept, frame, frame.to_cube(cloud[kept]))

    def _rebuild(
        self, network: OccupancyNetwork, passages: list[_Passage], seed: int, watch: Stopwatch
    ) -> None:
        """Implicit function, mesh and repair."""
        options = self.options
        device = next(network.parameters()).device
        with watch("implicit function"):
            views = torch.stack([self._views(passage.evidence, seed) for passage in passages])  # (B, V, P, 3)
            # One cloud at a time: rounding depends on the shape of a product, results must not on the batch.
            codes = torch.cat([network.encoder(view).mean(0, keepdim=True) for view in views.to(device)])
        with watch("field to mesh"):
            meshes = self._extract(network, codes)
        with watch("mesh repair"):
            for passage, mesh in zip(passages, meshes, strict=True):
                passage.mesh = mesh
                if not mesh.is_empty and options.repair is not None:
                    passage.repair = repair_mesh(mesh, passage.evidence.cpu().numpy(), options.repair)
                if mesh.is_empty or (passage.repair is not None and passage.repair.mesh.is_empty):
                    passage.fallback = "the network yields no surface"
                    logger.warning("cloud %d: no surface, the filtered input is resampled", passage.index)

    def _extract(self, network: OccupancyNetwork, codes: Tensor) -> list[Mesh]:
        """The surface of every code, at a lower level where there is none at the first."""
        options = self.options
        field = network.field_of(codes)
        meshes = extract_meshes(field, len(codes), options.extraction, device=codes.device)
        missing = [index for index, mesh in enumerate(meshes) if mesh.is_empty]
        if missing and options.second_threshold is not None:
            lower = dataclasses.replace(options.extraction, threshold=options.second_threshold)
            again = extract_meshes(network.field_of(codes[missing]), len(missing), lower, device=codes.device)
            for index, mesh in zip(missing, again, strict=True):
                meshes[index] = mesh
        return meshes

    def _views(self, evidence: Tensor, seed: int) -> Tensor:
        """Disjoint random subsets ``(V, P, 3)`` of the kept points; a small cloud repeats some."""
        size, views = self.options.points, self.options.views
        order = torch.randperm(len(evidence), generator=torch.Generator().manual_seed(seed))
        take = torch.arange(size * views) % len(order)
        return evidence[order[take].to(evidence.device)].view(views, size, 3)

    def _sample(self, passages: list[_Passage], seed: int) -> None:
        """Exactly the asked number of points from each surface, or from the filtered cloud without one."""
        for count in {passage.count for passage in passages}:
            group = [passage for passage in passages if passage.count == count]
            solid = [passage for passage in group if passage.mesh is not None and passage.fallback is None]
            if solid:
                for passage, points in zip(
                    solid, torch.from_numpy(self._points(solid, count, seed)), strict=True
                ):
                    passage.purified = passage.frame.from_cube(
                        points.to(passage.cloud.device), passage.cloud.dtype
                    )
            for passage in group:
                if passage.purified is None:
                    passage.purified = _refill(passage.cloud[passage.kept], count, seed)

    def _points(self, passages: list[_Passage], count: int, seed: int) -> Floats:
        """``(B, count, 3)`` points of the surfaces, unit cube."""
        options = self.options
        meshes = [_final_mesh(passage) for passage in passages]
        if options.tolerance is None:
            return resample(meshes, count, seed=seed, method=options.resampling, inset=options.offset)
        evidence = [passage.evidence.cpu().numpy() for passage in passages]
        return resample_with_evidence(
            meshes,
            evidence,
            count,
            tolerance=options.tolerance,
            smoothing=options.smoothing,
            seed=seed,
            inset=options.offset,
        )


def _published_sampling(points: Tensor, seed: int = 0) -> Tensor:
    """Simple random sampling that drops 500 of 1,024 points, in proportion for others."""
    return simple_random_sampling(points, points.shape[1] * 500 // 1024, seed=seed)


def _final_mesh(passage: _Passage) -> Mesh:
    assert passage.mesh is not None
    return passage.mesh if passage.repair is None else passage.repair.mesh


def _refill(points: Tensor, count: int, seed: int) -> Tensor:
    """Exactly ``count`` of the points: a random subset of them, or all of them and some twice."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(points), generator=generator) for _ in range(-(-count // len(points)))]
    return points[torch.cat(rounds)[:count].to(points.device)]


def _trace(passage: _Passage, seconds: dict[str, float]) -> Trace:
    def outward(mesh: Mesh | None) -> Mesh | None:
        if mesh is None or mesh.is_empty:
            return None
        return mesh.transformed(passage.frame.extent, passage.frame.centre.cpu().numpy())

    assert passage.purified is not None
    repair = passage.repair
    return Trace(
        points=passage.cloud.cpu().numpy(),
        kept_mask=passage.kept.cpu().numpy(),
        mesh=outward(passage.mesh),
        score=None if repair is None else repair.score,
        mask=None if repair is None else repair.mask,
        repaired=None if passage.mesh is None else outward(_final_mesh(passage)),
        purified=passage.purified.cpu().numpy(),
        fallback=passage.fallback,
        seconds=seconds,
    )


@functools.lru_cache(maxsize=8)
def _pretrained(method: str, device: torch.device) -> Purifier:
    return Purifier.from_pretrained(method).to(device)


def purify(
    points: Clouds,
    method: str = "onet-mesh",
    num_points: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Clouds:
    """Removes what an attacker did to point clouds.

    Args:
        points: one cloud ``(N, 3)``, a batch ``(B, N, 3)``, or a list of clouds of different sizes, NumPy or
            torch, in any frame and unit. They are not changed.
        method: ``"onet-mesh"``, or one of the baselines ``"sor"`` and ``"srs"``.
        num_points: points of each result; by default as many as came in.
        seed: seed of every draw, the same for every cloud: the result for a cloud does not depend on its
            batch.
        device: where to compute; by default where the points are.
        batch_size: clouds that go through the network together.
        progress: whether to show a progress bar.

    Returns:
        The same kind of array as ``points``, in the same frame, unit, precision and on the same device.

    Raises:
        TypeError: if a cloud is no array of real numbers.
        ValueError: if a cloud has a wrong shape, NaN or infinity, zero extent or fewer than 16 distinct
            points, or if there is none; the message names the cloud.
    """
    clouds = unpack(points)
    home = [cloud.device for cloud in clouds.clouds]
    target = torch.device(device) if device is not None else home[0]
    purifier = _pretrained(method, target)
    if batch_size != purifier.batch_size:
        purifier = Purifier(
            purifier.network, outliers=purifier.outliers, options=purifier.options, batch_size=batch_size
        )
    result = purifier([cloud.to(target) for cloud in clouds.clouds], num_points, seed, progress)
    return clouds.pack([cloud.to(device) for cloud, device in zip(result, home, strict=True)])


class Defended(nn.Module):
    """A classifier behind a purifier, again a classifier.

    Args:
        classifier: ``(B, N, 3)`` clouds → ``(B, classes)`` logits.
        purifier: what each cloud passes first.
        num_points: points that the classifier sees; by default as many as came in.
        normalise: whether purified clouds are centred on their mean and scaled to largest norm 1 again, as in
            IF-Defense; turn it off for a classifier that was not trained on such clouds.
        seed: seed of the purifier's draws.
    """

    def __init__(
        self,
        classifier: nn.Module,
        purifier: Purifier,
        *,
        num_points: int | None = None,
        normalise: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.classifier = classifier
        self.purifier = purifier
        self.num_points = num_points
        self.seed = seed

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of clouds ``(B, N, 3)``. No gradient passes the purifier."""
        clean = self.purifier(points, self.num_points, self.seed)
        logits: Tensor = self.classifier(to_unit_sphere(clean) if self.normalise else clean)
        return logits
