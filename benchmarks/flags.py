"""Flags (stand-in for the skeleton)."""

from __future__ import annotations

from typing import Any

from benchmarks.clouds import LabelledClouds
from benchmarks.foreign import Victim


def probe(victim: Victim, defence: Any, clouds: LabelledClouds, seed: int) -> dict[str, Any]:
    """Evidence about a defended victim."""
    return {}


def flags(evidence: dict[str, Any], cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Flags raised by the evidence and the cells."""
    return []
