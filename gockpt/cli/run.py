"""Run one command and say by the exit code how it ended."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from gockpt.cli.commands import cli
from gockpt.cli.output import OutputError, finish, log_lines_told, print_json, printable, tell
from gockpt.errors import CheckpointCorrupt, GockptError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

PROBLEMS, USAGE, NOT_FOUND, FAILED, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 130, 141


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments ask for; returns the exit code that docs/cli.md lists."""
    try:
        with log_lines_told():
            code = _carry_out(arguments)
        finish()
    except BrokenPipeError:
        _give_output_up()
        return BROKEN_PIPE
    except OutputError as error:
        _give_output_up()
        tell(f"gockpt: standard output can't be written: {printable(error)}")
        return FAILED
    return code


def _carry_out(arguments: Sequence[str]) -> int:
    try:
        # Not cli.main(): that has exit codes of its own for Ctrl-C and broken pipes.
        with cli.make_context("gockpt", list(arguments)) as context:
            return int(cli.invoke(context))
    except click.exceptions.Exit as end:  # after --help or --version
        return end.exit_code
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return USAGE
    except (KeyboardInterrupt, click.Abort):
        tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (GockptError, OSError) as error:
        finish()  # if that is what failed, it says so
        tell(f"gockpt: {printable(error)}")
        if "--json" in arguments:
            print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
        return _code_of(error)


def _give_output_up() -> None:
    """Lead standard output nowhere: the interpreter would try to write what is left once more at its end."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _code_of(error: Exception) -> int:
    for kind, code in ((UsageError, USAGE), (NotFoundError, NOT_FOUND), (CheckpointCorrupt, PROBLEMS)):
        if isinstance(error, kind):
            return code
    return FAILED
