"""Methods with shipped weights, see `ifdefense.purifiers.registry`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ifdefense.implicit.anomaly import AnomalyNetwork
from ifdefense.implicit.base import ImplicitNetwork, load_network
from ifdefense.point_networks.autoencoder import SHIPPED, AutoEncoder
from ifdefense.point_networks.punet import PUNet
from ifdefense.purifiers.base import Purifier
from ifdefense.purifiers.compose import Compose
from ifdefense.purifiers.filters import LocalSmoothing, RandomisedInput, StatisticalOutlierRemoval
from ifdefense.purifiers.mapped import MappedPurifier
from ifdefense.purifiers.surface import SurfacePurifier
from ifdefense.restorers.mesh import MeshRestorer
from ifdefense.restorers.optimised import Adam, OptimisedRestorer, Solver
from ifdefense.restorers.ridge import RidgeRestorer
from ifdefense.stages.anomaly import AnomalyRepair
from ifdefense.stages.density import DensitySampling
from ifdefense.stages.extraction import Tracking
from ifdefense.stages.resampling import FillSampling

LOCAL_MESH = RidgeRestorer(
    MeshRestorer(Tracking(36, 6, finer=48), None), oversample=1.25, density=DensitySampling()
)
"""Without the repair, which has its own weights.

To the network a sheet is 0.03 thick, so the grid of 36 cells of 0.033 can lose it between its planes, and the
one of 48 cannot.

Samples at the density of the input reach the margin more often, so fewer are needed.
"""

LOCAL_RANDOM = dataclasses.replace(LOCAL_MESH, oversample=1.5, density=None)
"""Samples uniform by area; for half of the points with noise, other densities were not tested."""

ADAM = Adam(every=4)
"""As published, but with the field evaluated at every fourth step (docs/experiments.md)."""


def local_mesh(weights: str | Path = "local", *, repaired: bool = True) -> Compose:
    """SOR, local occupancy network, repaired mesh, and samples moved to the maximum of the field.

    Examples:
        >>> purifier = local_mesh(repaired=False)
        >>> purifier(points).shape
        torch.Size([2, 64, 3])
    """
    return _local("local-mesh", weights, repaired=repaired)


def local_random(weights: str | Path = "local") -> Compose:
    """As `local_mesh`, from a random part of the points with noise, unpredictable for attackers.

    The mesh is not repaired, as repair gains little on half of the points (docs/experiments.md).

    Examples:
        >>> local_random().deterministic
        False
    """
    return _local("local-random", weights, RandomisedInput(), restorer=LOCAL_RANDOM, repaired=False)


def _local(
    name: str,
    weights: str | Path,
    *filters: Purifier,
    restorer: RidgeRestorer = LOCAL_MESH,
    repaired: bool = True,
) -> Compose:
    """SOR, further filters, and the surface of a local occupancy network."""
    network = load_network(weights)
    if repaired:
        restorer = restorer.with_stages(repair=anomaly_repair(network))
    return Compose([StatisticalOutlierRemoval(), *filters, SurfacePurifier(network, restorer)], name)


def anomaly_repair(network: ImplicitNetwork) -> AnomalyRepair:
    """Repair of `local_mesh`; reuses the codes of ``network`` if it has the shipped weights.

    Examples:
        >>> repair = anomaly_repair(load_network("local"))
        >>> repair.core
        0.42
    """
    return AnomalyRepair(AnomalyNetwork.load().share(network))


def onet_mesh(weights: str | Path = "onet") -> Compose:
    """SOR, then samples of the repaired mesh: ONet-Mesh of IF-Defense, with mesh repair.

    Examples:
        >>> [part.name for part in onet_mesh().parts]
        ['sor', 'surface']
    """
    surface = SurfacePurifier(load_network(weights), MeshRestorer())
    return Compose([StatisticalOutlierRemoval(), surface], "onet-mesh")


def onet_opt(weights: str | Path = "onet", solver: Solver = ADAM) -> Compose:
    """SOR, then points attracted to the surface and spread over it: ONet-Opt of IF-Defense.

    With the solver `ifdefense.restorers.optimised.Newton` it is another ten times faster.

    Examples:
        >>> from ifdefense.restorers.optimised import Newton
        >>> onet_opt(solver=Newton()).name
        'onet-opt'
    """
    surface = SurfacePurifier(load_network(weights), OptimisedRestorer(solver))
    return Compose([StatisticalOutlierRemoval(), surface], "onet-opt")


def convonet_mesh(weights: str | Path = "convonet") -> Compose:
    """SOR, then samples of the mesh of a Convolutional Occupancy Network.

    Examples:
        >>> convonet_mesh().name
        'convonet-mesh'
    """
    surface = SurfacePurifier(load_network(weights), MeshRestorer(repair=None))
    return Compose([StatisticalOutlierRemoval(), surface], "convonet-mesh")


def convonet_opt(weights: str | Path = "convonet", solver: Solver = ADAM) -> Compose:
    """As `onet_opt`, with a Convolutional Occupancy Network: ConvONet-Opt of IF-Defense.

    Examples:
        >>> convonet_opt().name
        'convonet-opt'
    """
    surface = SurfacePurifier(load_network(weights), OptimisedRestorer(solver))
    return Compose([StatisticalOutlierRemoval(), surface], "convonet-opt")


def onet_fill(weights: str | Path = "onet") -> Compose:
    """SOR, mean of 8 neighbours, and samples of the repaired mesh where no input point is within 0.3.

    Examples:
        >>> onet_fill().name
        'onet-fill'
    """
    surface = SurfacePurifier(load_network(weights), MeshRestorer(resample=FillSampling()))
    return Compose([StatisticalOutlierRemoval(), surface], "onet-fill")


def sor_smooth() -> Compose:
    """SOR, then the mean of 8 neighbours.

    Examples:
        >>> sor_smooth()(points).shape
        torch.Size([2, 64, 3])
    """
    return Compose([StatisticalOutlierRemoval(), LocalSmoothing(8)], "sor-smooth")


def dup_net(weights: str | Path = "punet") -> Compose:
    """SOR, then PU-Net: DUP-Net (https://arxiv.org/abs/1812.11017), with the requested number of points.

    The published classifiers use all 4,096 points: set ``num_points`` accordingly.

    Examples:
        >>> dup_net()(points).shape
        torch.Size([2, 64, 3])
    """
    return Compose([StatisticalOutlierRemoval(), MappedPurifier(PUNet.load(weights))], "dup-net")


def sor_ae(weights: str | Path = SHIPPED) -> Compose:
    """SOR, then the reconstruction of an auto-encoder.

    Examples:
        >>> sor_ae()(points).shape
        torch.Size([2, 64, 3])
    """
    return Compose([StatisticalOutlierRemoval(), MappedPurifier(AutoEncoder.load(weights))], "sor-ae")
