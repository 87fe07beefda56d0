"""Attacks on any classifier from ``(B, N, 3)`` points to ``(B, num_classes)`` logits."""

from attacks.adaptive import BPDA, EOT, Adaptive, DefenceAware, adaptive
from attacks.add_cluster import AddCluster
from attacks.add_object import AddObject
from attacks.add_points import AddCD, AddHD
from attacks.advpc import AdvPC
from attacks.aof import AOF
from attacks.apgd import APGD
from attacks.base import Attack, AttackResult, ThreatModel
from attacks.corruptions import CORRUPTIONS, corrupt
from attacks.cw import Perturb
from attacks.drop import LocalDrop, RandomDrop, SaliencyDrop
from attacks.fgm import FGM, IFGM, MIFGM
from attacks.geoa3 import GeoA3
from attacks.hit_adv import HiTADV
from attacks.jgba import JGBA
from attacks.knn import KNN
from attacks.pgd import PGD
from attacks.resume import attack_in_batches
from attacks.si_adv import SIAdv
from attacks.square import Square
from attacks.targets import random_targets
from attacks.transfer import Transfer

__all__ = [
    "AOF",
    "APGD",
    "BPDA",
    "CORRUPTIONS",
    "EOT",
    "FGM",
    "IFGM",
    "JGBA",
    "KNN",
    "MIFGM",
    "PGD",
    "Adaptive",
    "AddCD",
    "AddCluster",
    "AddHD",
    "AddObject",
    "AdvPC",
    "Attack",
    "AttackResult",
    "DefenceAware",
    "GeoA3",
    "HiTADV",
    "LocalDrop",
    "Perturb",
    "RandomDrop",
    "SIAdv",
    "SaliencyDrop",
    "Square",
    "ThreatModel",
    "Transfer",
    "adaptive",
    "attack_in_batches",
    "corrupt",
    "random_targets",
]
