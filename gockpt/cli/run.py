"""Run one command and say by the exit code how it ended."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from gockpt.cli.commands import cli
from gockpt.cli.output import print_json, printable, tell
from gockpt.errors import CheckpointCorrupt, GockptError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

PROBLEMS, USAGE, NOT_FOUND, FAILED, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 4, 130, 141


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments ask for; returns the exit code that docs/cli.md lists."""
    try:
        # Not cli.main(): that has exit codes of its own for Ctrl-C and broken pipes.
        with cli.make_context("gockpt", list(arguments)) as context:
            code = int(cli.invoke(context))
        sys.stdout.flush()
        return code
    except click.exceptions.Exit as end:  # after --help or --version
        sys.stdout.flush()
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return USAGE
    except (KeyboardInterrupt, click.Abort):
        tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has gone; the interpreter would try to flush once more when it ends.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (GockptError, OSError) as error:
        if "--json" in arguments:
            print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
        tell(f"gockpt: {printable(error)}")
        return _code_of(error)


def _code_of(error: Exception) -> int:
    for kind, code in ((UsageError, USAGE), (NotFoundError, NOT_FOUND), (CheckpointCorrupt, PROBLEMS)):
        if isinstance(error, kind):
            return code
    return FAILED
