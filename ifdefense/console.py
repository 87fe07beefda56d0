"""Shared parts of the command lines: lazily imported commands, options and huge pages."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)

Command = TypeVar("Command", bound=Callable[..., object])


def meant(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the most similar known name, or nothing."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def use_huge_pages() -> None:
    """Enables huge pages in PyTorch's CPU allocator, unless ``THP_MEM_ALLOC_ENABLE`` is set.

    Call it before the first tensor is created. Page faults take up to a quarter of a forward pass on a CPU,
    as freed memory is mapped and zeroed again; pages of 2 MiB reduce them by a factor of 512. No effect on
    systems without huge pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def let_threads_sleep() -> None:
    """Makes waiting OpenMP threads sleep instead of spin, unless the environment sets their behaviour.

    Call it before PyTorch is imported, as OpenMP reads its variables once. On a busy machine, spinning slows
    down a network several times.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "passive"


def device_option(command: Command) -> Command:
    """Adds the option ``--device``; the command receives a checked `torch.device`."""
    return click.option(
        "--device",
        default="cpu",
        callback=_usable_device,
        show_default=True,
        help="Device to compute on, such as cuda:0.",
    )(command)


def _usable_device(context: click.Context, parameter: click.Parameter, value: str) -> torch.device:
    from ifdefense.arguments import device_of

    try:
        return device_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Reports user errors (bad values, files, data, NaN losses) as one line, with exit code 1.

    Use as a decorator of a command. The traceback is logged at level DEBUG.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        _LOG.debug("traceback of the error", exc_info=True)
        raise click.ClickException(str(error)) from None


class LazyGroup(click.Group):
    """Command group that imports its commands when they are called, so that ``--help`` is fast.

    Errors of the commands are `reported`.

    Args:
        lazy: ``"module:attribute"`` and one line of help for each command name.
    """

    def __init__(self, *args: object, lazy: dict[str, tuple[str, str]], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.lazy = lazy

    def invoke(self, context: click.Context) -> object:
        """Runs a command."""
        with reported():
            return super().invoke(context)

    def list_commands(self, context: click.Context) -> list[str]:
        """Sorted names of the commands."""
        return sorted([*super().list_commands(context), *self.lazy])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports and returns a command."""
        if name not in self.lazy:
            return super().get_command(context, name)
        let_threads_sleep()
        module, attribute = self.lazy[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        help_of = {name: line for name, (_, line) in self.lazy.items()}
        help_of |= {name: command.get_short_help_str() for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted(help_of.items()))
