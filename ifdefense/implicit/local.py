"""Local occupancy network: an implicit function with one code per point.

A single code per cloud (`OccupancyNetwork`) loses details. Here a U-shaped encoder computes a code per point
with local, regional and global context: edge layers on the points and on a quarter of them, self-attention on
a sixteenth. The code of a point is an affine map. The decoder evaluates the maps of a query's nearest points,
combines them by attention, and adds a global affine map, which covers queries far from all points.

Labels describe the *thickened surface*: points within ``Calibration.offset`` of the surface are occupied, so
open sheets are represented as well as solids.

Everything is in the unit-cube frame: the cloud's longest side is 1 and its bounding box is centred on 0.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ifdefense.geometry.gathering import affine_bags, affine_rows, neighbour_max, numbers_per_block
from ifdefense.geometry.points import Neighbours, farthest_samples, gather, neighbours_of_each
from ifdefense.implicit.base import Calibration, even_parts, random_subset
from ifdefense.threads import parallel_map

CHUNK = 2304
"""Queries per chunk at inference: a compromise between the overhead of calls and the cache of a core."""

AROUND = 17
"""Minimum number of neighbours searched per point, itself included: that of `ifdefense.implicit.anomaly`, so
that both share one search."""

_FINE, _COARSE = 16.0, 6.0  # scale differences between neighbours to about 1


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """Sizes of a local occupancy network.

    Attributes:
        width: features per point.
        coarse: features per coarse point and per token.
        values: output size of a point's affine map, a multiple of ``heads``.
        heads: attention heads of the decoder.
        hidden: width of the last layers, and output size of the global affine map.
        neighbours: neighbours per edge layer, including the point itself.
        moments: neighbours whose mean and covariance are input features.
        nearest: nearest points per query.
        blocks: self-attention blocks on the tokens.

    Raises:
        ValueError: if a size is too small, ``values`` is not a multiple of ``heads``, or ``coarse`` is not a
            multiple of 4, the heads of the self-attention.
    """

    width: int = 64
    coarse: int = 128
    values: int = 48
    heads: int = 6
    hidden: int = 128
    neighbours: int = 12
    moments: int = 16
    nearest: int = 8
    blocks: int = 3

    def __post_init__(self) -> None:
        least = {"width": 8, "coarse": 8, "values": 6, "hidden": 8}
        for name, value in vars(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {value}")
        if self.values % self.heads or self.coarse % 4:
            raise ValueError(
                f"values must be a multiple of {self.heads} and coarse of 4, got {self.values}, {self.coarse}"
            )

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> LocalConfig:
        """Infers the sizes from a state dict.

        Raises:
            ValueError: if tensors are missing.
        """
        try:
            heads, values = state["decoder.attend.weight"].shape
            hidden = state["decoder.out.weight"].shape[1]
            width = state["encoder.values.weight"].shape[1]
            coarse = state["encoder.tokens.out.weight"].shape[0]
            neighbours, moments, nearest = state["encoder.counts"].tolist()
        except KeyError as error:
            raise ValueError(f"not a local occupancy network: tensor {error} is missing") from None
        blocks = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.blocks."))
        return cls(width, coarse, values, heads, hidden, int(neighbours), int(moments), int(nearest), blocks)


class Structure(NamedTuple):
    """Neighbourhoods of a batch, as indices into its concatenated points.

    Attributes:
        near: ``(B, N, k)`` nearest points of each point, itself first; k is the largest
            of `AROUND`, ``moments`` and ``neighbours``.
        coarse: ``(B, M)`` coarse points.
        coarse_from: ``(B, M, neighbours)`` nearest points of each coarse point.
        coarse_near: ``(B, M, neighbours)`` nearest coarse points of each coarse point, into the coarse
            points.
        up: ``(B, N, 3)`` nearest coarse points of each point, into the coarse points.
        tokens: ``(B, T)`` tokens, into the coarse points.
        token_from: ``(B, T, neighbours)`` nearest coarse points of each token.
        token_up: ``(B, M, 3)`` nearest tokens of each coarse point, into the tokens.
    """

    near: Tensor
    coarse: Tensor
    coarse_from: Tensor
    coarse_near: Tensor
    up: Tensor
    tokens: Tensor
    token_from: Tensor
    token_up: Tensor


class LocalCode(NamedTuple):
    """Codes of a batch of clouds.

    Attributes:
        points: ``(B, N, 3)`` clouds.
        maps: ``(B, N, 4 values)`` offset and three columns of each point's affine map.
        whole: ``(B, 4 hidden)`` offset and three columns of each cloud's global affine map.
        near: ``(B N, k)`` nearest points of each point, see `Structure`.
    """

    points: Tensor
    maps: Tensor
    whole: Tensor
    near: Tensor


def k_nearest(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Indices ``(B, Q, k)`` of the nearest points, nearest first; the last one repeats if ``N < k``.

    Args:
        queries: ``(B, Q, 3)``.
        points: ``(B, N, 3)``.
        k: neighbours.
    """
    return _nearest(queries, [Neighbours(source) for source in points], k)


def _nearest(queries: Tensor, points: Sequence[Neighbours], k: int) -> Tensor:
    return torch.stack([padded(source, query, k) for query, source in zip(queries, points, strict=True)])


def padded(neighbours: Neighbours, queries: Tensor, k: int) -> Tensor:
    """Indices ``(Q, k)`` of one cloud's points nearest to ``(Q, 3)``; the last one repeats if ``N < k``."""
    found = min(k, len(neighbours.source))
    index = neighbours(queries, found)
    return torch.cat([index, index[:, -1:].expand(-1, k - found)], 1)


def _exact(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies a layer to positions in full precision under autocast, as their differences are small."""
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = layer(x)
    return out


def _flat(index: Tensor, size: int) -> Tensor:
    """Converts indices per cloud of ``size`` points to indices into the concatenated clouds."""
    start = torch.arange(len(index), device=index.device) * size
    return index + start.view(-1, *(1,) * (index.ndim - 1))


def coarse_points(clouds: Sequence[Tensor]) -> list[Tensor]:
    """Indices of a quarter of the points of each cloud ``(N_i, 3)``, invariant to the order of points."""
    clouds = [cloud.detach() for cloud in clouds]
    first = torch.stack([(cloud - cloud.mean(0)).square().sum(-1).argmax() for cloud in clouds])
    return farthest_samples(clouds, [max(1, len(cloud) // 4) for cloud in clouds], first)


def structure(clouds: Tensor, config: LocalConfig, index: Tensor | None = None) -> Structure:
    """Neighbourhoods of clouds ``(B, N, 3)`` on all levels, invariant to the order of points.

    Args:
        clouds: the clouds.
        config: sizes of the neighbourhoods.
        index: ``(B, N / 4)`` their `coarse_points`, if already known.
    """
    clouds = clouds.detach()
    size = clouds.shape[1]
    index = torch.stack(coarse_points(list(clouds))) if index is None else index
    coarse_size, token_size = index.shape[1], max(1, size // 16)
    coarse = gather(clouds, index)
    k = config.neighbours
    order = torch.arange(token_size, device=clouds.device).expand(len(clouds), -1)
    fine, middle, top = (
        [Neighbours(part) for part in level] for level in (clouds, coarse, coarse[:, :token_size])
    )
    # Coarse points are a subset of the points, and tokens of the coarse points, so neighbours are shared.
    near = _nearest(clouds, fine, max(config.moments, k, AROUND))
    coarse_near = _nearest(coarse, middle, k)
    return Structure(
        _flat(near, size),
        _flat(index, size),
        _flat(gather(near, index)[..., :k], size),
        _flat(coarse_near, coarse_size),
        _flat(_nearest(clouds, middle, 3), coarse_size),
        _flat(order, coarse_size),
        _flat(coarse_near[:, :token_size], coarse_size),
        _flat(_nearest(coarse, top, 3), token_size),
    )


def mix_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over neighbours: ``(R, C)`` rows, ``(S, k)`` indices and weights → ``(S, C)``."""
    picked = rows.index_select(0, index.flatten()).view(*index.shape, -1)
    return (picked * weights[..., None]).sum(1)


def _interpolation(targets: Tensor, sources: Tensor, index: Tensor) -> Tensor:
    """Inverse squared distance weights ``(S, 3)`` of positions ``(S, 3)`` to their neighbours."""
    near = sources.index_select(0, index.flatten()).view(*index.shape, 3)
    weight = 1 / ((near - targets[:, None]).square().sum(-1) + 1e-4)
    return weight / weight.sum(-1, keepdim=True)


class EdgeLayer(nn.Module):
    """``h + W2 relu(W1 [h, max_j relu(A h_j + B (p_j - p_i))])`` on normalised features.

    As ``max_j relu(u_j - v_i) = relu(max_j u_j - v_i)`` with ``u_j = A h_j + B p_j`` and ``v_i = B p_i``, no
    matrix product per edge is needed.
    """

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(width)
        self.source = nn.Linear(width, width)
        self.position = nn.Linear(3, width, bias=False)
        self.inner = nn.Linear(2 * width, width)
        self.outer = nn.Linear(width, width)
        nn.init.normal_(self.outer.weight, std=0.3 / width**0.5)

    def forward(self, rows: Tensor, points: Tensor, near: Tensor) -> Tensor:
        """Maps ``(R, width)`` at ``(R, 3)`` with neighbours ``(R, k)``."""
        normed = self.norm(rows)
        position = _exact(self.position, points * self.scale)
        around = F.relu(neighbour_max(self.source(normed) + position, near) - position)
        out: Tensor = rows + self.outer(F.relu(self.inner(torch.cat([normed, around], 1))))
        return out


class PoolLayer(nn.Module):
    """Pools to the next coarser level: maximum of ``relu(A h_j + B (p_j - c))``, then a linear layer."""

    def __init__(self, size_in: int, size_out: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(size_in)
        self.source = nn.Linear(size_in, size_out)
        self.position = nn.Linear(3, size_out, bias=False)
        self.absolute = nn.Linear(3, size_out)
        self.out = nn.Linear(size_out, size_out)

    def forward(self, rows: Tensor, points: Tensor, centres: Tensor, near: Tensor) -> Tensor:
        """``(R, size_in)`` at ``(R, 3)`` → ``(S, size_out)`` at ``(S, 3)``, with neighbours ``(S, k)``."""
        source = self.source(self.norm(rows)) + _exact(self.position, points * self.scale)
        around = F.relu(neighbour_max(source, near) - _exact(self.position, centres * self.scale))
        out: Tensor = self.out(around) + self.absolute(2 * centres)
        return out


class TokenBlock(nn.Module):
    """Self-attention over the tokens of a cloud, then an MLP."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_0, self.norm_1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        for layer in (self.mix, self.outer):
            nn.init.normal_(layer.weight, std=0.3 / layer.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, T, width)``."""
        parts = self.qkv(self.norm_0(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        with torch.autocast(x.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(*(part.to(x.dtype) for part in (query, key, value)))
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.outer(F.relu(self.inner(self.norm_1(x))))
        return out


class LocalEncoder(nn.Module):
    """Encoder: clouds to an affine map per point and a global one."""

    counts: Tensor

    def __init__(self, config: LocalConfig) -> None:
        super().__init__()
        self.config = config
        width, coarse = config.width, config.coarse
        self.register_buffer(
            "counts", torch.tensor([config.neighbours, config.moments, config.nearest]).float()
        )
        self.first = nn.Linear(3 + 2 * 9, width)
        self.second = nn.Linear(width, width)
        self.fine = nn.ModuleList(EdgeLayer(width, _FINE) for _ in range(4))
        self.down = PoolLayer(width, coarse, _FINE)
        self.coarse = nn.ModuleList(EdgeLayer(coarse, _COARSE) for _ in range(3))
        self.tokens = PoolLayer(coarse, coarse, _COARSE)
        self.blocks = nn.ModuleList(TokenBlock(coarse) for _ in range(config.blocks))
        self.token_norm = nn.LayerNorm(coarse)
        self.token_up = nn.Linear(coarse, coarse)
        self.coarse_norm = nn.LayerNorm(coarse)
        self.up = nn.Linear(coarse, width)
        self.norm = nn.LayerNorm(width)
        self.values = nn.Linear(width, 4 * config.values)
        self.whole_0 = nn.Linear(2 * coarse, coarse)
        self.whole_1 = nn.Linear(coarse, 4 * config.hidden)

    def _moments(self, points: Tensor, near: Tensor) -> Tensor:
        """Position, and mean and covariance of the nearest 8 and of all neighbours, ``(R, 21)``."""
        planes = points.t().contiguous()
        picked = planes.index_select(1, near.t().flatten()).view(3, *near.t().shape)
        relative = (picked - planes[:, None]) * _FINE  # (3, k, R): sums over whole rows are fast
        parts = [2 * planes]
        for group in (relative[:, :8], relative):
            mean = group.mean(1)
            x, y, z = (group - mean[:, None]).unbind()
            products = ((x, x), (y, y), (z, z), (x, y), (x, z), (y, z))
            parts += [2 * mean, torch.stack([2 * (a * b).mean(0) for a, b in products])]
        return torch.cat(parts).t()

    def forward(self, clouds: Tensor, graph: Structure | None = None) -> LocalCode:
        """Codes of clouds ``(B, N, 3)``; ``graph`` is their precomputed `structure`."""
        graph = structure(clouds, self.config) if graph is None else graph
        batch, k = len(clouds), self.config.neighbours
        points = clouds.flatten(0, 1)
        near = graph.near.flatten(0, 1)
        edges = near[:, :k]
        moments = self._moments(points, near[:, : self.config.moments])
        h = self.second(F.relu(_exact(self.first, moments)))
        for layer in self.fine[:2]:
            h = layer(h, points, edges)
        centres = points.index_select(0, graph.coarse.flatten())
        coarse_near = graph.coarse_near.flatten(0, 1)
        c = self.down(h, points, centres, graph.coarse_from.flatten(0, 1))
        c = self.coarse[0](c, centres, coarse_near)
        anchors = centres.index_select(0, graph.tokens.flatten())
        t = self.tokens(c, centres, anchors, graph.token_from.flatten(0, 1)).unflatten(0, (batch, -1))
        for block in self.blocks:
            t = block(t)
        t = self.token_norm(t)
        whole = self.whole_1(F.relu(self.whole_0(torch.cat([t.amax(1), t.mean(1)], 1))))
        token_up = graph.token_up.flatten(0, 1)
        rows = self.token_up(t.flatten(0, 1))
        c = c + mix_rows(rows, token_up, _interpolation(centres, anchors, token_up))
        for layer in self.coarse[1:]:
            c = layer(c, centres, coarse_near)
        up = graph.up.flatten(0, 1)
        h = h + mix_rows(self.up(self.coarse_norm(c)), up, _interpolation(points, centres, up))
        for layer in self.fine[2:]:
            h = layer(h, points, edges)
        return LocalCode(clouds, self.values(self.norm(h)).unflatten(0, (batch, -1)), whole, near)


class LocalDecoder(nn.Module):
    """Decoder: logit of a query from the maps of its nearest points and the global map."""

    def __init__(self, config: LocalConfig) -> None:
        super().__init__()
        self.config = config
        self.attend = nn.Linear(config.values, config.heads, bias=False)
        self.fall = nn.Parameter(torch.linspace(0.5, 4, config.heads))
        self.local = nn.Linear(config.values + 1, config.hidden)
        self.whole = nn.Linear(config.hidden, config.hidden, bias=False)
        self.inner = nn.Linear(config.hidden, config.hidden)
        self.last = nn.Linear(config.hidden, config.hidden)
        self.out = nn.Linear(config.hidden, 1)
        nn.init.normal_(self.inner.weight, std=0.5 / config.hidden**0.5)

    def forward(self, queries: Tensor, points: Tensor, maps: Tensor, whole: Tensor, near: Tensor) -> Tensor:
        """Logits of queries of one or more clouds.

        Args:
            queries: ``(M, 3)``.
            points: ``(R, 3)`` concatenated points.
            maps: ``(R, 4 values)`` maps of the points.
            whole: ``(B, 4 hidden)`` global maps of the clouds, with M / B queries each.
            near: ``(M, nearest)`` indices of the nearest points, nearest first.

        Returns:
            ``(M,)``.
        """
        heads = self.config.heads
        index = near.flatten()
        relative = queries[:, None] - points.index_select(0, index).view(*near.shape, 3)
        # Proportional to the difference near a point, saturating to its direction far away.
        relative = _FINE * relative * torch.rsqrt(1 + 36 * relative.square().sum(-1, keepdim=True))
        value = affine_rows(maps, index, relative.flatten(0, 1)).view(*near.shape, -1)  # (M, k, values)
        distance = relative.square().sum(-1, keepdim=True)
        weight = (self.attend(value) - F.softplus(self.fall) * distance).softmax(1)  # (M, k, heads)
        mixed = (value.unflatten(-1, (heads, -1)) * weight[..., None]).sum(1).flatten(1)
        with torch.autocast(whole.device.type, enabled=False):
            around = whole.to(queries.dtype).unflatten(1, (4, -1))
            z = torch.baddbmm(around[:, :1], 2 * queries.view(len(whole), -1, 3), around[:, 1:])
        z = F.relu(z).flatten(0, 1)
        x = self.local(torch.cat([mixed, distance[:, 0]], 1)) + self.whole(z)
        x = x + self.inner(F.relu(x))
        x = F.relu(self.last(F.relu(x)))
        logits: Tensor = self.out(x).squeeze(-1)
        return logits


class _Rows(NamedTuple):
    """Concatenated codes of clouds.

    Attributes:
        planes: ``(3, R)`` coordinates of the points.
        maps: ``(R, 4 values)`` their maps.
        whole: ``(B, 4 hidden)`` global maps.
    """

    planes: Tensor
    maps: Tensor
    whole: Tensor

    @classmethod
    def of(cls, codes: Sequence[LocalCode]) -> _Rows:
        points, maps, whole = (
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*((c.points[0].detach(), c.maps[0], c.whole) for c in codes), strict=True)
        )
        return cls(points.t().contiguous(), maps, whole)


class LocalField:
    """The fields of several clouds at inference; see `ifdefense.implicit.base.Field`.

    An affine map is a weighted sum of four rows, and attention a weighted sum of values per head. Both are
    computed as weighted bags of embeddings, which read each row once and store no intermediate results.

    Args:
        decoder: decoder of the network.
        codes: one code per cloud, each with ``B = 1``.
    """

    def __init__(self, decoder: LocalDecoder, codes: list[LocalCode]) -> None:
        self.decoder, self.codes = decoder, codes
        self.neighbours = [Neighbours(code.points[0], code.near) for code in codes]
        self._clouds = [_Rows.of([code]) for code in codes]
        self._fall = F.softplus(decoder.fall).view(-1, 1, 1)
        self._layers = [
            layer.weight.t().contiguous()
            for layer in (decoder.local, decoder.whole, decoder.inner, decoder.last)
        ]

    def _of_cloud(self, row: int, queries: Tensor) -> Tensor:
        near = padded(self.neighbours[row], queries, self.decoder.config.nearest)
        return self._logits(self._clouds[row], near.t(), queries)

    def _of_all(self, queries: list[Tensor], owner: Tensor) -> Tensor:
        """Logits of the queries of all clouds at once, as every call costs a launch on an accelerator."""
        sources = [code.points[0] for code in self.codes]
        sizes = [len(source) for source in sources]
        if min(sizes) < self.decoder.config.nearest:  # neighbours repeat
            found = [
                padded(neighbours, part, self.decoder.config.nearest)
                for neighbours, part in zip(self.neighbours, queries, strict=True)
            ]
        else:
            found = neighbours_of_each(queries, sources, self.decoder.config.nearest)
        starts = itertools.accumulate([0, *sizes[:-1]])
        near = torch.cat([part + start for part, start in zip(found, starts, strict=True)])
        rows = _Rows.of(self.codes)
        chunk = numbers_per_block(near.device) // (near.shape[1] * self.decoder.config.values)
        parts = zip(near.split(chunk), torch.cat(queries).split(chunk), owner.split(chunk), strict=True)
        return torch.cat([self._logits(rows, index.t(), part, cloud) for index, part, cloud in parts])

    def _logits(self, rows: _Rows, near: Tensor, queries: Tensor, owner: Tensor | None = None) -> Tensor:
        """Logits ``(M,)`` of queries of one cloud, or of the clouds in ``owner``."""
        decoder, (local, whole, inner, last) = self.decoder, self._layers
        if owner is None:
            around = rows.whole.view(4, -1)
            z = torch.addmm(around[0], 2 * queries, around[1:]).relu_()
        else:
            z = affine_bags(rows.whole, owner, torch.cat([torch.ones_like(queries[:, :1]), 2 * queries], 1))
        x = torch.addmm(decoder.local.bias, self._attended(rows, near, queries), local)
        x = x.addmm_(z, whole)
        x = torch.addmm(decoder.inner.bias, x.relu(), inner).add_(x).relu_()
        x = torch.addmm(decoder.last.bias, x, last).relu_()
        return torch.addmv(decoder.out.bias, x, decoder.out.weight[0])

    def _attended(self, rows: _Rows, near: Tensor, queries: Tensor) -> Tensor:
        """Mean of the maps of ``near`` (k, M), and the nearest point's distance, ``(M, values + 1)``."""
        heads, width = self.decoder.config.heads, self.decoder.config.values
        count, size = near.shape
        index = near.flatten()
        offsets = [
            query - plane.index_select(0, index).view(count, size)
            for query, plane in zip(queries.t(), rows.planes, strict=True)
        ]
        square = offsets[0].square().addcmul_(offsets[1], offsets[1]).addcmul_(offsets[2], offsets[2])
        scale = _FINE * torch.rsqrt(1 + 36 * square)
        terms = torch.stack([torch.ones_like(scale), *(offset.mul_(scale) for offset in offsets)], -1)
        value = affine_bags(rows.maps, index, terms.view(-1, 4))
        distance = square.mul_(scale).mul_(scale)
        score = (self.decoder.attend.weight @ value.t()).view(heads, count, size)
        weight = score.addcmul_(self._fall, distance, value=-1).softmax(1)
        weight = weight.view(heads * count, size).t().contiguous()  # a transposed matrix is copied faster
        order = torch.arange(size * heads, device=index.device)[:, None]
        parts = order + torch.arange(0, count * size * heads, size * heads, device=index.device)
        table = value.view(-1, width // heads)
        mixed = F.embedding_bag(parts, table, per_sample_weights=weight.view(-1, count), mode="sum")
        return torch.cat([mixed.view(size, width), distance[0].unsqueeze(1)], 1)

    def __call__(self, points: Tensor, cloud: Tensor) -> Tensor:
        """Logits of queries of several clouds; differentiable.

        Args:
            points: ``(M, 3)`` queries, unit-cube frame.
            cloud: ``(M,)`` int64 index of each query's cloud, ascending.

        Returns:
            ``(M,)`` logits, independent of the batch.
        """
        counts = torch.bincount(cloud, minlength=len(self.codes)).tolist()
        parts = []
        graph = torch.is_grad_enabled() and (points.requires_grad or self.codes[0].maps.requires_grad)
        if points.device.type != "cpu" and len(points) and not graph:
            with torch.no_grad():
                return self._of_all(list(points.split(counts)), cloud)
        for row, (code, part) in enumerate(zip(self.codes, points.split(counts), strict=True)):
            if not len(part):
                continue
            if graph:
                near = padded(self.neighbours[row], part, self.decoder.config.nearest)
                parts.append(self.decoder(part, code.points[0], code.maps[0], code.whole, near))
                continue
            with torch.no_grad():
                parts += parallel_map(functools.partial(self._of_cloud, row), even_parts(part, CHUNK))
        return torch.cat(parts) if parts else points.new_zeros(0)


class LocalOccupancyNetwork(nn.Module):
    """Implicit network of the thickened surface with one code per point.

    Differentiable in the queries and the clouds, with neighbourhoods held fixed.

    Args:
        config: sizes of the layers.
        calibration: interpretation of the field.

    Shapes:
        - **clouds:** ``(B, N, 3)``, unit-cube frame, any N
        - **queries:** ``(B, Q, 3)``, unit-cube frame
        - **logits:** ``(B, Q)``; occupancy is Bernoulli with these logits

    Examples:
        >>> network = LocalOccupancyNetwork().eval()
        >>> network(points, queries=points[:, :5]).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        config: LocalConfig = LocalConfig(),
        calibration: Calibration = Calibration(box=1.2, threshold=0.5, offset=0.015, points=1024),
    ) -> None:
        super().__init__()
        self.config = config
        self.calibration = calibration
        self.encoder = LocalEncoder(config)
        self.decoder = LocalDecoder(config)

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LocalOccupancyNetwork:
        """Builds an untrained network with the sizes and the calibration of weights."""
        return cls(LocalConfig.of_state(state), Calibration.of_metadata(metadata))

    def codes(self, clouds: Tensor, graph: Structure | None = None) -> LocalCode:
        """Codes of a batch ``(B, N, 3)``; ``graph`` is its precomputed `structure`."""
        code: LocalCode = self.encoder(clouds, graph)
        return code

    def decode(self, code: LocalCode, queries: Tensor, near: Tensor | None = None) -> Tensor:
        """Logits ``(B, Q)`` at queries ``(B, Q, 3)``; ``near`` are their precomputed nearest points."""
        batch, size = code.points.shape[:2]
        if near is None:
            near = _flat(k_nearest(queries, code.points, self.config.nearest), size)
        parts = (queries, code.points, code.maps)
        logits: Tensor = self.decoder(*(part.flatten(0, 1) for part in parts), code.whole, near.flatten(0, 1))
        return logits.view(batch, -1)

    def forward(self, clouds: Tensor, queries: Tensor) -> Tensor:
        """Occupancy logits at the queries."""
        return self.decode(self.codes(clouds), queries)

    def encode(self, clouds: Sequence[Tensor], seed: int = 0) -> list[LocalCode]:
        """Codes of clouds ``(N_i, 3)``, limited to a random subset of ``calibration.points`` points.

        Clouds are encoded one by one, as rounding depends on the shapes of products, and codes must not
        depend on the batch.
        """
        device = self.encoder.counts.device
        most = self.calibration.points
        given = [random_subset(cloud, most, seed).to(device) for cloud in clouds]
        graphs = [
            structure(cloud[None], self.config, index[None])
            for cloud, index in zip(given, coarse_points(given), strict=True)
        ]
        return [self.codes(cloud[None], graph) for cloud, graph in zip(given, graphs, strict=True)]

    def field(self, code: list[LocalCode]) -> LocalField:
        """The fields of encoded clouds."""
        return LocalField(self.decoder, code)
