"""Operations on batches of points, ``(B, N, 3)`` in PyTorch; dtype and device follow the input.

Distances are computed from coordinate differences rather than ``|a|^2 - 2ab + |b|^2``, which is inaccurate
far from the origin and varies with the batch.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ifdefense.devices import in_float64

# Distances per chunk of `knn`: fits the cache of a CPU and bounds the memory.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


# Number of pairs above which a KD-tree is faster on a CPU.
_TREE = 1 << 24
# The same for one neighbour each, where the tree gains more.
_NEAREST_TREE = 1 << 20
# Queries beyond which a KD-tree is worth several threads.
_THREADED = 1 << 14
# Batch size, in points, up to which a step of farthest-point sampling is as fast on a CPU as on an
# accelerator, where it needs a dozen launches.
_STEP = 1 << 16
_KERNEL_DEVICES = {"cuda"}
# Coordinate of padding points: never neighbours, and its square is finite.
_FAR = 1e9


@functools.cache
def _pytorch3d() -> ModuleType | None:
    """``pytorch3d.ops`` if installed: same results, faster on a GPU."""
    try:
        return importlib.import_module("pytorch3d.ops")
    except ImportError:
        return None


def _kernels(points: Tensor) -> ModuleType | None:
    """pytorch3d's kernels if they are installed and support the points.

    GPU only: on a CPU its sampling takes twice as long, and distances differ in the last bit.
    """
    usable = points.dtype == torch.float32 and points.device.type in _KERNEL_DEVICES
    return _pytorch3d() if usable else None


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise squared Euclidean distances; differentiable.

    Args:
        a: (B, N, D) points.
        b: (B, M, D) points.

    Returns:
        (B, N, M) squared distances, in squared units of the input.

    Examples:
        >>> squared_distances(points, points[:, :5]).shape
        torch.Size([2, 64, 5])
    """
    _check_pair(a, b)
    total = a.new_zeros(())
    for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True):
        difference = x.unsqueeze(2) - y.unsqueeze(1)  # (B, N, M)
        total = torch.addcmul(total, difference, difference)
    return total


def knn(query: Tensor, source: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest points of ``source`` for each point of ``query``, nearest first; differentiable.

    If ``query`` is ``source``, each point is its own first neighbour. Queries are processed in chunks:
    without gradients, memory does not grow with N x M.

    Args:
        query: (B, N, D) points.
        source: (B, M, D) points.
        k: neighbours, 1 <= k <= M.

    Returns:
        Squared distances and int64 indices into ``source``, both (B, N, k).

    Raises:
        ValueError: incompatible shapes, or ``k`` outside 1..M.

    Examples:
        >>> squared, index = knn(points, points, 4)
        >>> index.shape, bool((index[0, :, 0] == torch.arange(64)).all())
        (torch.Size([2, 64, 4]), True)
    """
    _check_pair(query, source)
    batch, num_source = source.shape[:2]
    if not 1 <= k <= num_source:
        raise ValueError(f"k must lie in 1..{num_source}, the number of source points, got {k}")
    if (kernels := _kernels(query)) is not None:
        found = kernels.knn_points(query, source, K=k, return_sorted=True)
        return found.dists, found.idx
    if query.device.type == "cpu" and query.shape[2] == 3 and query.shape[1] * num_source > _TREE:
        return _tree_neighbours(query, source, k)
    limit = _CHUNK.get(query.device.type, _CHUNK["cuda"])
    rows = max(1, limit // max(1, batch * num_source))
    parts = [_smallest(squared_distances(chunk, source), k) for chunk in torch.split(query, rows, dim=1)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([d for d, _ in parts], dim=1), torch.cat([i for _, i in parts], dim=1)


class Neighbours:
    """Nearest-neighbour search in one cloud for many queries; on a CPU by a KD-tree, built once.

    Args:
        source: (M, 3) points.
        own: (M, K) result of `own` for K, if already known.

    Examples:
        >>> search = Neighbours(points[0])
        >>> search(points[1], 4).shape
        torch.Size([64, 4])
    """

    def __init__(self, source: Tensor, own: Tensor | None = None) -> None:
        self.source = source.detach()
        self._own = own
        self._tree: Any = None
        if source.device.type == "cpu":
            from scipy.spatial import cKDTree

            # Unbalanced trees are built several times faster, and queries are as fast.
            points = self.source.double().numpy()
            self._tree = cKDTree(points, balanced_tree=False, compact_nodes=False)

    def __call__(self, query: Tensor, k: int) -> Tensor:
        """Indices (N, k), int64 and nearest first, for ``query`` (N, 3); 1 <= k <= M."""
        query = query.detach()
        if self._tree is None:
            return knn(query[None], self.source[None], k)[1][0]
        workers = torch.get_num_threads() if len(query) > _THREADED else 1
        index = self._tree.query(query.double().numpy(), np.arange(1, k + 1), workers=workers)[1]
        return torch.from_numpy(np.asarray(index))

    def own(self, k: int) -> Tensor:
        """Indices (M, k) of the neighbours of each source point, itself first; 1 <= k <= M.

        The largest search is cached and reused for smaller ``k``.
        """
        if self._own is None or self._own.shape[1] < k:
            self._own = self(self.source, k)
        return self._own[:, :k]


def neighbours_of_each(queries: Sequence[Tensor], sources: Sequence[Tensor], k: int) -> list[Tensor]:
    """Indices (N_i, k) of the nearest points for the queries of each cloud, by one search for all clouds.

    Args:
        queries: (N_i, 3) points.
        sources: (M_i, 3) points, at least ``k``.
        k: neighbours.
    """
    query = torch.nn.utils.rnn.pad_sequence(list(queries), batch_first=True)
    source = torch.nn.utils.rnn.pad_sequence(list(sources), batch_first=True, padding_value=_FAR)
    index = knn(query.detach(), source.detach(), k)[1]
    return [row[: len(part)] for row, part in zip(index, queries, strict=True)]


@torch.no_grad()
def nearest_squared(points: Tensor, k: int) -> Tensor:
    """Squared distances of each point to its ``k`` nearest points, itself included, ascending.

    The distances of `knn`, on a CPU by a KD-tree for clouds of any size.

    Args:
        points: (B, N, 3) points.
        k: neighbours, 1 <= k <= N.

    Returns:
        (B, N, k) squared distances.
    """
    _check_cloud(points)
    size = points.shape[1]
    exact = points.device.type == "cpu" and points.dtype in (torch.float32, torch.float64)
    if not exact or points.shape[2] != 3 or not 1 <= k <= size:
        return knn(points, points, k)[0]
    # A few more candidates, as the tree ranks near ties in float64.
    return _tree_neighbours(points, points, min(k + 2, size))[0].sort(-1).values[..., :k]


def _tree_neighbours(query: Tensor, source: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`knn` by one KD-tree per cloud."""
    found = [Neighbours(points)(part, k) for part, points in zip(query, source, strict=True)]
    neighbours = torch.stack(found)
    total = query.new_zeros(())
    for x, y in zip(query.unbind(-1), source.unbind(-1), strict=True):
        difference = x.unsqueeze(2) - y.gather(1, neighbours.flatten(1)).view_as(neighbours)
        total = torch.addcmul(total, difference, difference)
    return total, neighbours


def _smallest(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` smallest entries of the last axis, ascending, and their indices."""
    if k == 1:
        values, index = distances.min(dim=-1, keepdim=True)
    else:
        values, index = distances.topk(k, dim=-1, largest=False, sorted=True)
    return values, index


@torch.no_grad()
def farthest_point_sampling(points: Tensor, num: int, *, start: int | Tensor = 0) -> Tensor:
    """Farthest-point sampling: indices of ``num`` points, each the farthest from those chosen before.

    Greedy 2-approximation of the k-centre problem (Gonzalez, 1985; PointNet++, Qi et al., 2017,
    https://arxiv.org/abs/1706.02413). Deterministic, ties included. Time is O(B * N * num), memory O(B * N).

    Args:
        points: (B, N, D) points.
        num: points to sample, 1 <= num <= N.
        start: index of the first point in every cloud, or (B,) int64 one per cloud.

    Returns:
        (B, num) int64 indices in sampling order, so every prefix is a farthest-point sample. Indices may
        repeat if there are fewer than ``num`` distinct positions.

    Raises:
        ValueError: ``points`` not (B, N, D), ``num`` outside 1..N, or ``start`` outside 0..N-1.

    Examples:
        >>> index = farthest_point_sampling(points, 8)
        >>> gather(points, index).shape
        torch.Size([2, 8, 3])
    """
    _check_cloud(points)
    batch, size, _ = points.shape
    if not 1 <= num <= size:
        raise ValueError(f"farthest-point sampling takes 1..{size} of {size} points, asked for {num}")
    first = torch.as_tensor(start)
    lowest, highest = torch.stack([first.min(), first.max()]).tolist()
    if not 0 <= lowest <= highest < size:
        raise ValueError(f"start must lie in 0..{size - 1}, got {start}")
    if (kernels := _kernels(points)) is not None:
        return _by_kernel(kernels, points, num, first.to(points.device).expand(batch))
    if points.device.type != "cpu" and batch * size <= _STEP:
        return farthest_point_sampling(points.cpu(), num, start=first.cpu()).to(points.device)
    if batch == 1 and points.device.type == "cpu" and points.dtype in (torch.float32, torch.float64):
        return _farthest(points[0], num, lowest)[None]
    # Contiguous coordinates and preallocated buffers, so that the loop allocates nothing.
    planes = [plane.contiguous() for plane in points.unbind(-1)]
    nearest = torch.full((batch, size), torch.inf, dtype=points.dtype, device=points.device)
    distance, difference = torch.empty_like(nearest), torch.empty_like(nearest)
    chosen = torch.empty((num, batch, 1), dtype=torch.int64, device=points.device)
    chosen[0] = first.expand(batch).unsqueeze(1)
    for previous, current in itertools.pairwise(chosen.unbind()):
        torch.sub(planes[0], planes[0].gather(1, previous), out=distance)
        distance.mul_(distance)
        for plane in planes[1:]:
            torch.sub(plane, plane.gather(1, previous), out=difference)
            distance.addcmul_(difference, difference)
        torch.minimum(nearest, distance, out=nearest)
        _argmax(nearest, out=current)
    return chosen.squeeze(-1).T.contiguous()


def _by_kernel(kernels: ModuleType, points: Tensor, num: int, start: Tensor) -> Tensor:
    """`farthest_point_sampling` by PyTorch3D, which starts at the first point: the start is swapped there."""
    row, start = torch.arange(len(points), device=points.device), start.unsqueeze(1)
    swapped = points.clone()
    swapped[:, 0], swapped[row, start[:, 0]] = points[row, start[:, 0]], points[:, 0]
    index: Tensor = kernels.sample_farthest_points(swapped, K=num, random_start_point=False)[1]
    return torch.where(index == 0, start, torch.where(index == start, 0, index))


def _farthest(points: Tensor, num: int, start: int) -> Tensor:
    """`farthest_point_sampling` of one cloud (N, D) on a CPU: identical results with half as many calls."""
    planes = points.t().contiguous()
    columns = planes.split(1, dim=1)
    difference = torch.empty_like(planes)
    first, *others = difference.unbind()
    distance = torch.empty_like(first)
    nearest = torch.full_like(first, torch.inf)
    values = nearest.numpy()
    chosen = [start]
    for _ in range(num - 1):
        torch.sub(planes, columns[chosen[-1]], out=difference)
        torch.mul(first, first, out=distance)
        for other in others:
            distance.addcmul_(other, other)
        torch.minimum(nearest, distance, out=nearest)
        chosen.append(int(values.argmax()))
    return torch.tensor(chosen)


def stacked(clouds: Sequence[Tensor]) -> Tensor:
    """Clouds (N_i, D) as one batch (B, N, D), padded with copies of their first points.

    At distance 0 from a sampled point, copies are sampled last.
    """
    size = max(map(len, clouds))
    return torch.stack([torch.cat([cloud, cloud[:1].expand(size - len(cloud), -1)]) for cloud in clouds])


def farthest_samples(clouds: Sequence[Tensor], nums: Sequence[int], start: Tensor) -> list[Tensor]:
    """`farthest_point_sampling` of clouds of different sizes in one loop.

    Args:
        clouds: (N_i, D) points.
        nums: points to sample of each, 1 <= num_i <= N_i.
        start: (B,) int64, the first point in each cloud.

    Returns:
        (num_i,) int64 indices of each cloud, as if sampled by itself.
    """
    index = farthest_point_sampling(stacked(clouds), max(nums), start=start)
    # A device may select either of two copies.
    return [
        row[:num].where(row[:num] < len(cloud), 0)
        for row, cloud, num in zip(index, clouds, nums, strict=True)
    ]


@torch.no_grad()
def spread_sampling(points: Tensor, num: int, *, block: int = 4096) -> Tensor:
    """Farthest-point sampling in linear time: exact for small clouds, blockwise for large ones.

    Clouds of more than ``block`` points are split at medians into blocks of at most ``block / 2`` points,
    which are sampled independently. Samples are less even only along the borders of blocks.

    Args:
        points: (B, N, 3) points.
        num: points to sample, 1 <= num <= N.
        block: largest number of points sampled exactly.

    Returns:
        (B, num) int64 indices.

    Raises:
        ValueError: as `farthest_point_sampling`.

    Examples:
        >>> spread_sampling(points, 8).shape
        torch.Size([2, 8])
    """
    _check_cloud(points)
    size = points.shape[1]
    if size <= block or num > size:
        return farthest_point_sampling(points, num)
    return torch.stack([_in_blocks(cloud, num, block) for cloud in points])


def _in_blocks(cloud: Tensor, num: int, block: int) -> Tensor:
    """`spread_sampling` of one cloud (N, 3)."""
    parts = [torch.arange(len(cloud), device=cloud.device)]
    while len(parts[0]) > block // 2:
        halves = []
        for part in parts:
            inside = cloud[part]
            axis = int((inside.amax(0) - inside.amin(0)).argmax())
            order = part[inside[:, axis].argsort(stable=True)]
            halves += [order[: len(order) // 2], order[len(order) // 2 :]]
        parts = halves
    longest = max(map(len, parts))
    # Blocks are padded with copies of their first point, which are sampled last. The shares sum to num.
    ends = [num * end // len(cloud) for end in itertools.accumulate(map(len, parts))]
    shares = [end - start for start, end in itertools.pairwise([0, *ends])]
    padded = torch.stack([torch.cat([part, part[:1].expand(longest - len(part))]) for part in parts])
    chosen = farthest_point_sampling(cloud[padded], max(1, *shares))
    return torch.cat([row[found[:share]] for row, found, share in zip(padded, chosen, shares, strict=True)])


def _argmax(values: Tensor, *, out: Tensor) -> None:
    """Row-wise argmax, written to ``out`` (B, 1); the first of equals on a CPU."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        # NumPy's argmax is vectorised and ten times as fast as PyTorch's.
        values.numpy().argmax(axis=1, keepdims=True, out=out.numpy())
    else:
        torch.argmax(values, dim=1, keepdim=True, out=out)


@torch.no_grad()
def ball_query(query: Tensor, source: Tensor, radius: float, k: int) -> Tensor:
    """Indices of the first ``k`` points of ``source`` within ``radius`` of each point of ``query``.

    In the order of ``source``, not by distance. Balls with fewer points repeat the first one, empty balls the
    nearest point (PointNet++, Qi et al., 2017, https://arxiv.org/abs/1706.02413). Memory does not grow with N
    x M.

    Args:
        query: (B, N, D) points.
        source: (B, M, D) points.
        radius: radius of the open balls, in units of the input, positive.
        k: indices per ball, at least 1; may exceed M.

    Returns:
        (B, N, k) int64 indices.

    Raises:
        ValueError: incompatible shapes, an empty ``source``, or ``radius`` or ``k`` not positive.

    Examples:
        >>> ball_query(points[:, :4], points, radius=0.3, k=8).shape
        torch.Size([2, 4, 8])
    """
    _check_pair(query, source)
    batch, num_source = source.shape[:2]
    if num_source == 0:
        raise ValueError("a ball query needs at least one source point")
    if radius <= 0 or k < 1:
        raise ValueError(f"radius and k must be positive, got {radius} and {k}")
    if (kernels := _kernels(query)) is not None:
        index: Tensor = kernels.ball_query(query, source, K=k, radius=radius, return_nn=False).idx
        index = torch.where(index < 0, index[..., :1], index)
    else:
        limit = _CHUNK.get(query.device.type, _CHUNK["cuda"])
        rows = max(1, limit // max(1, batch * num_source))
        chunks = torch.split(query, rows, dim=1)
        index = torch.cat([_first_inside(chunk, source, radius, k) for chunk in chunks], dim=1)
    empty = index[..., :1] < 0
    if query.device.type != "cpu" or bool(empty.any()):  # cheaper than to synchronise
        index = torch.where(empty, knn(query, source, 1)[1], index)
    return index


def _first_inside(query: Tensor, source: Tensor, radius: float, k: int) -> Tensor:
    """Indices of :func:`ball_query`, all -1 for an empty ball."""
    inside = squared_distances(query, source) < radius * radius
    count = inside.sum(dim=-1)  # (B, N)
    column = inside.flatten(0, 1).nonzero()[:, 1]  # by ball, ascending within each
    if len(column) == 0:
        return column.new_full((*count.shape, k), -1)
    start = (count.flatten().cumsum(0) - count.flatten()).unsqueeze(1)
    slot = torch.arange(k, device=query.device).expand(len(start), -1)
    slot = torch.where(slot < count.flatten().unsqueeze(1), slot, 0)
    index = column[(start + slot).clamp_max_(len(column) - 1)].unflatten(0, count.shape)
    return torch.where(count.unsqueeze(-1) > 0, index, -1)


def group(points: Tensor, features: Tensor | None, centre: Tensor, index: Tensor) -> Tensor:
    """Groups neighbourhoods: positions relative to the centre, concatenated with features; differentiable.

    Args:
        points: (B, N, D) points.
        features: (B, N, C) features, or ``None``.
        centre: (B, S, D) centres.
        index: (B, S, k) int64 indices of neighbours, from :func:`ball_query` or :func:`knn`.

    Returns:
        (B, S, k, D) or (B, S, k, D + C).

    Examples:
        >>> centre = points[:, :4]
        >>> index = ball_query(centre, points, radius=0.3, k=8)
        >>> group(points, None, centre, index).shape
        torch.Size([2, 4, 8, 3])
    """
    relative = gather(points, index) - centre.unsqueeze(2)
    return relative if features is None else torch.cat([relative, gather(features, index)], dim=-1)


def gather(points: Tensor, index: Tensor) -> Tensor:
    """Batched row selection.

    Args:
        points: (B, N, C) points or features.
        index: (B, ...) int64 indices into each cloud.

    Returns:
        (B, ..., C).

    Examples:
        >>> gather(points, torch.tensor([[0, 1], [5, 6]])).shape
        torch.Size([2, 2, 3])
    """
    batch, channels = points.shape[0], points.shape[2]
    flat = index.reshape(batch, -1, 1).expand(-1, -1, channels)
    return points.gather(1, flat).reshape(*index.shape, channels)


def three_interpolate(query: Tensor, source: Tensor, features: Tensor) -> Tensor:
    """Features at ``query``: means of those of the three nearest points of ``source``.

    Feature propagation of PointNet++ (Qi et al., 2017, https://arxiv.org/abs/1706.02413), weighted by
    inverse squared distances. Differentiable in the features, not in the positions.

    Args:
        query: (B, N, D) points.
        source: (B, M, D) points; fewer than three are all used.
        features: (B, M, C) features of ``source``.

    Returns:
        (B, N, C).

    Examples:
        >>> coarse = points[:, :8]
        >>> three_interpolate(points, coarse, features=coarse).shape
        torch.Size([2, 64, 3])
    """
    squared, index = knn(query.detach(), source.detach(), min(3, source.shape[1]))
    weight = 1 / (squared + 1e-8)
    weight = weight / weight.sum(-1, keepdim=True)
    return (gather(features, index) * weight.unsqueeze(-1)).sum(2)


def split_neighbourhood(points: Tensor, centre: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Splits each cloud into the neighbourhood of a point and the rest.

    Args:
        points: (B, N, 3) clouds.
        centre: (B,) indices of the centre points.
        size: size of the neighbourhood, including its centre.

    Returns:
        (B, size, 3) neighbours, nearest first, and (B, N - size, 3) other points in their order.

    Examples:
        >>> inside, outside = split_neighbourhood(points, torch.tensor([0, 3]), 16)
        >>> inside.shape, outside.shape
        (torch.Size([2, 16, 3]), torch.Size([2, 48, 3]))
    """
    batch, num = points.shape[:2]
    inside = knn(gather(points, centre[:, None]), points, size)[1].squeeze(1)
    outside = torch.ones(batch, num, dtype=torch.bool, device=points.device).scatter_(1, inside, False)
    return gather(points, inside), points[outside].view(batch, num - size, 3)


def local_mean(points: Tensor, k: int) -> Tensor:
    """Replaces each point by the mean of its ``k`` nearest points, itself included; differentiable.

    Attenuates per-point noise.

    Args:
        points: (B, N, D) points.
        k: neighbours, at least 1; limited to N.

    Returns:
        (B, N, D) means, accumulated in float64.

    Raises:
        ValueError: ``k`` is less than 1.

    Examples:
        >>> local_mean(points, 8).shape
        torch.Size([2, 64, 3])
    """
    if k < 1:
        raise ValueError(f"smoothing must be at least 1, got {k}")
    k = min(k, points.shape[1])
    if k == 1:
        return points
    index = knn(points.detach(), points.detach(), k)[1]
    return in_float64(gather(points, index)).mean(2).to(points)


def nearest_neighbour(query: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest point of ``source`` for each point of ``query``; differentiable in both.

    Neighbours are searched without gradients, so no N x M matrix is kept for a backward pass.

    Args:
        query: (B, N, D) points.
        source: (B, M, D) points.

    Returns:
        Squared distances and int64 indices into ``source``, both (B, N).

    Examples:
        >>> squared, index = nearest_neighbour(points, points + 0.1)
        >>> squared.shape
        torch.Size([2, 64])
    """
    _check_pair(query, source)
    with torch.no_grad():
        if query.device.type == "cpu" and query.shape[1] * source.shape[1] > _NEAREST_TREE:
            found = [Neighbours(points)(part, 1) for part, points in zip(query, source, strict=True)]
            index = torch.stack(found).squeeze(2)
        else:
            index = knn(query, source, 1)[1].squeeze(2)
    return (query - gather(source, index)).square().sum(2), index


def directed_chamfer(points: Tensor, others: Tensor, *, squared: bool = True) -> Tensor:
    """Mean distance from each point to the nearest of ``others``, one half of `chamfer_distance`.

    Examples:
        >>> directed_chamfer(points[:, :32], points)
        tensor([0., 0.])
    """
    distance = nearest_neighbour(points, others)[0]
    return (distance if squared else root(distance)).mean(1)


def chamfer_distance(a: Tensor, b: Tensor, *, squared: bool = True) -> Tensor:
    """Chamfer distance: mean nearest distance from ``a`` to ``b`` plus that from ``b`` to ``a``.

    Differentiable, with gradient 0 where points coincide.

    Args:
        a: (B, N, 3) points.
        b: (B, M, 3) points.
        squared: squared distances (Chamfer-L2, as in the attacks) instead of Euclidean ones (Chamfer-L1).

    Returns:
        (B,) distances, in units of the input, squared if ``squared``.

    Examples:
        >>> chamfer_distance(points, points)
        tensor([0., 0.])
    """
    return directed_chamfer(a, b, squared=squared) + directed_chamfer(b, a, squared=squared)


def root(squared: Tensor) -> Tensor:
    """Square root, with gradient 0 instead of infinity at 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)


def kth_smallest(values: Tensor, k: int, dim: int) -> Tensor:
    """The k-th smallest value along an axis, which is kept; k from 1.

    Sorts on accelerators: with deterministic algorithms, CUDA rejects `Tensor.kthvalue` and `Tensor.median`
    along an axis, as they also return an index.
    """
    if values.device.type == "cpu":
        return values.kthvalue(k, dim, keepdim=True).values
    return values.sort(dim).values.narrow(dim, k - 1, 1)


def lower_median(values: Tensor, dim: int) -> Tensor:
    """The median along an axis, which is kept; the lower one of two."""
    return kth_smallest(values, (values.shape[dim] + 1) // 2, dim)


def _check_cloud(points: Tensor) -> None:
    if points.ndim != 3 or not points.is_floating_point():
        shape = tuple(points.shape)
        raise ValueError(f"points must be a float tensor (B, N, D), got {shape} of {points.dtype}")


def _check_pair(a: Tensor, b: Tensor) -> None:
    _check_cloud(a)
    _check_cloud(b)
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"two batches of points must agree in B and D, got {shapes}")
