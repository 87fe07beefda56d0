"""Attacks on any classifier from ``(B, N, 3)`` points to ``(B, num_classes)`` logits."""

from attacks.base import Attack, AttackResult, ThreatModel
from attacks.cw import Perturb
from attacks.drop import SaliencyDrop
from attacks.pgd import PGD
from attacks.targets import random_targets

__all__ = ["PGD", "Attack", "AttackResult", "Perturb", "SaliencyDrop", "ThreatModel", "random_targets"]
