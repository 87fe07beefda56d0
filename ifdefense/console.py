"""Shared by the command lines: lazily imported commands and huge pages."""

from __future__ import annotations

import importlib
import os

import click


def use_huge_pages() -> None:
    """Lets PyTorch ask for huge pages, unless ``THP_MEM_ALLOC_ENABLE`` says otherwise.

    For whole programs, before their first tensor. What a pass of a network frees goes back to the system, and
    the next pass has it mapped and zeroed anew, page by page: on a CPU a sixth to a quarter of the time of a
    pass. With pages of 2 MiB there are 512 times fewer of them. Does nothing where Linux has none.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that ``--help`` answers at once.

    Args:
        commands: ``"module:attribute"`` and one line of help for each name.
    """

    def __init__(self, *args: object, lazy: dict[str, tuple[str, str]], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.lazy = lazy

    def list_commands(self, context: click.Context) -> list[str]:
        """Names of all commands, in alphabetical order."""
        return sorted([*super().list_commands(context), *self.lazy])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of that name, imported now if need be."""
        if name not in self.lazy:
            return super().get_command(context, name)
        module, attribute = self.lazy[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        help_of = {name: line for name, (_, line) in self.lazy.items()}
        help_of |= {name: command.get_short_help_str() for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(help_of.items()))
