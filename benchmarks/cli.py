"""``ifdefense-bench``: the demo and the measurements of all published figures."""

from __future__ import annotations

import logging

import click

from ifdefense.console import LazyGroup, use_huge_pages

COMMANDS = {
    "accelerator": ("benchmarks.accelerator:accelerator", "Tests on an accelerator, and its times."),
    "ablation": ("benchmarks.studies.ablation:ablation", "What each part of the purifier contributes."),
    "attack-speed": ("benchmarks.speed:attack_speed", "Time of attacks in bare passes of the model."),
    "attacked": ("benchmarks.attacked_clouds:attacked", "Attacked clouds as a file, to score defences on."),
    "attacked-set": (
        "benchmarks.attacked_set:attacked_set",
        "Attacked clouds of known surfaces, for training.",
    ),
    "conditions": ("benchmarks.studies.conditions:conditions", "Voxels, images and samples of the prior."),
    "demo": ("benchmarks.demo:demo", "Attack a classifier, purify, classify again."),
    "labels": ("benchmarks.studies.labels:labels", "Guessed solids behind clouds against the true ones."),
    "optimisation": (
        "benchmarks.studies.optimisation:optimisation",
        "Solvers of onet-opt compared.",
    ),
    "point-operations": ("benchmarks.speed:point_operations", "Time of neighbour searches."),
    "purified-set": ("benchmarks.purified_set:purified_set", "Purified copies of clouds, for training."),
    "purify-speed": ("benchmarks.speed:purify_speed", "Time and memory of purify."),
    "reconstruction": (
        "benchmarks.studies.reconstruction:reconstruction",
        "Distance of purified clouds from the true surface.",
    ),
    "refinement": (
        "benchmarks.studies.refinement:refinement",
        "Meshes before and after simplification and refinement.",
    ),
    "repair": (
        "benchmarks.studies.repair:repair",
        "What the mesh repair finds and costs.",
    ),
    "report": ("benchmarks.report:report", "Results and cards as a page, Markdown and JSON."),
    "run": ("benchmarks.run:run", "Measures a defence under static and adaptive attacks."),
    "submit": ("benchmarks.submit:submit", "The card of a defence, for the leaderboard."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ifdefense")
def main() -> None:
    """Measures attacks and defences; results are written as JSON."""
    use_huge_pages()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
