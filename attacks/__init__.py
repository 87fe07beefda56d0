"""Attacks on any classifier from ``(B, N, 3)`` points to ``(B, num_classes)`` logits.

In the examples, ``points`` are two clouds of 64 points with ``labels``, and ``classifier`` has four classes.
"""

from attacks.adding.cluster import AddCluster
from attacks.adding.object import AddObject
from attacks.adding.points import AddCD, AddHD
from attacks.base import Attack, AttackResult, ThreatModel
from attacks.black_box.square import Square
from attacks.black_box.transfer import Transfer
from attacks.defence_aware.adaptive import adaptive
from attacks.defence_aware.jgba import JGBA
from attacks.defence_aware.model import BPDA, EOT, DefenceAware, FunctionPurifier
from attacks.defence_aware.surrogate import SurrogateGradient
from attacks.dropping.drop import LocalDrop, RandomDrop, SaliencyDrop
from attacks.ensemble import Ensemble
from attacks.gradient.apgd import APGD
from attacks.gradient.fgm import FGM, IFGM, MIFGM
from attacks.gradient.pgd import PGD
from attacks.gradient.si_adv import SIAdv
from attacks.gradient.warm_start import WarmStart
from attacks.optimised.advpc import AdvPC
from attacks.optimised.aof import AOF
from attacks.optimised.geoa3 import GeoA3
from attacks.optimised.hit_adv import HiTADV
from attacks.optimised.knn import KNN
from attacks.optimised.perturb import Perturb
from attacks.oracle import Oracle
from attacks.resume import attack_in_batches
from attacks.targets import random_targets
from attacks.worst_of import WorstOf

__all__ = [
    "AOF",
    "APGD",
    "BPDA",
    "EOT",
    "FGM",
    "IFGM",
    "JGBA",
    "KNN",
    "MIFGM",
    "PGD",
    "AddCD",
    "AddCluster",
    "AddHD",
    "AddObject",
    "AdvPC",
    "Attack",
    "AttackResult",
    "DefenceAware",
    "Ensemble",
    "FunctionPurifier",
    "GeoA3",
    "HiTADV",
    "LocalDrop",
    "Oracle",
    "Perturb",
    "RandomDrop",
    "SIAdv",
    "SaliencyDrop",
    "Square",
    "SurrogateGradient",
    "ThreatModel",
    "Transfer",
    "WarmStart",
    "WorstOf",
    "adaptive",
    "attack_in_batches",
    "random_targets",
]
