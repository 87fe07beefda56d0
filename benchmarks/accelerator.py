"""Checks for an accelerator, in five minutes: device tests, and the time of purify."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import torch

import ifdefense
from benchmarks import result_files
from benchmarks.speed import growth, make_clouds, timing_options
from benchmarks.text_tables import text_table
from ifdefense.purifiers.registry import METHODS

COUNTS = (1, 16, 256)
TESTS = Path(__file__).parents[1] / "tests" / "test_devices.py"
LIMIT = 180
"""Seconds after which the tests are stopped."""


def passed(device: torch.device) -> bool | None:
    """Whether the device tests pass; ``None`` without tests, as in a wheel."""
    if not TESTS.is_file():
        return None
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS), "--device", str(device)]
    try:
        return subprocess.run(command, timeout=LIMIT, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@click.command()
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(list(METHODS)),
    default=("local-mesh", "dup-net"),
    show_default=True,
    help="Repeatable.",
)
@click.option("--tests/--no-tests", default=True, show_default=True, help="Whether to run the tests.")
@timing_options("accelerator.json")
def accelerator(methods: tuple[str, ...], tests: bool, repeats: int, device: torch.device, out: Path) -> None:
    """Runs the tests of devices on an accelerator, and times purify for 1, 16 and 256 clouds.

    Select the device with --device cuda.
    """
    fine = passed(device) if tests else None
    clouds = make_clouds(max(COUNTS))
    seconds = {
        method: growth(ifdefense.load(method, device=device), clouds, repeats, COUNTS) for method in methods
    }
    about = {"device": str(device), "points": int(clouds.shape[1]), "repeats": repeats, "tests": fine}
    result_files.write(out, "accelerator", **about, seconds_per_cloud=seconds)
    rows = [[name, *(f"{1000 * value:.1f}" for value in one.values())] for name, one in seconds.items()]
    click.echo(text_table(["ms per cloud", *(f"{count} clouds" for count in COUNTS)], rows))
    if fine is False:
        raise click.ClickException(f"the tests fail on {device}")
