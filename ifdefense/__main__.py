"""``python -m ifdefense`` is the command ``ifdefense``."""

from ifdefense.cli import main

main(prog_name="ifdefense")
