"""``ifdefense-bench``: the demo and the measurements of all published figures."""

from __future__ import annotations

import logging

import click

from ifdefense.console import LazyGroup, use_huge_pages

COMMANDS = {
    "accelerator": ("benchmarks.accelerator:accelerator", "Tests on an accelerator, and its times."),
    "ablation": ("benchmarks.ablation:ablation", "What each part of the purifier contributes."),
    "adaptive": ("benchmarks.adaptive:adaptive", "Attackers who know the defence, and the worst of them."),
    "attack-speed": ("benchmarks.attack_speed:attack_speed", "Time of attacks in bare passes of the model."),
    "attacked": ("benchmarks.attacked_clouds:attacked", "Attacked clouds as a file, to score defences on."),
    "attacked-set": (
        "benchmarks.attacked_set:attacked_set",
        "Attacked clouds of known surfaces, for training.",
    ),
    "conditions": ("benchmarks.conditions:conditions", "Voxels, images and samples of the prior."),
    "corruptions": ("benchmarks.corruption:corruptions", "Accuracy on corrupted clouds (ModelNet40-C)."),
    "demo": ("benchmarks.demo:demo", "Attack a classifier, purify, classify again."),
    "labels": ("benchmarks.labels:labels", "Guessed solids behind clouds against the true ones."),
    "optimisation": ("benchmarks.optimisation:optimisation", "Solvers of onet-opt: time and accuracy."),
    "point-operations": ("benchmarks.point_operations:point_operations", "Time of neighbour searches."),
    "purified-set": ("benchmarks.purified_set:purified_set", "Purified copies of clouds, for training."),
    "purify-speed": ("benchmarks.purify_speed:purify_speed", "Time and memory of purify."),
    "reconstruction": (
        "benchmarks.reconstruction:reconstruction",
        "Distance of purified clouds from the true surface.",
    ),
    "refinement": (
        "benchmarks.refinement:refinement",
        "Meshes before and after simplification and refinement.",
    ),
    "repair": ("benchmarks.repair:repair", "Anomalies that the mesh repair finds, and what it costs."),
    "report": ("benchmarks.report:report", "Results and cards as a page, Markdown and JSON."),
    "run": ("benchmarks.run:run", "Measures a defence under static and adaptive attacks."),
    "robustness": ("benchmarks.robustness:robustness", "Every attack against every defence."),
    "submit": ("benchmarks.submit:submit", "The card of a defence, for the leaderboard."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ifdefense")
def main() -> None:
    """Measures attacks and defences; results are written as JSON."""
    use_huge_pages()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
