"""What every command does around its own work: what is not its fault is one line and an exit code."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from shift_kernels.environment import check_words
from shift_kernels.errors import ShiftInputError
from shift_kernels.extras import explained

FAILED, UNUSABLE, INTERRUPTED, CANCELLED, CLOSED_PIPE = 1, 2, 75, 130, 141
"""Exit codes: a full disk, say; bad input, a missing extra; stopped, and to be started again (EX_TEMPFAIL);
Ctrl-C, and nobody reads on (128 + the signal, as in shells)."""


class Main(Protocol):
    """The function of a command."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def command(name: str, resumable: bool = False) -> Callable[[Main], Main]:
    """Decorate the function of a command: arguments (None: those of the process) -> exit code.

    Args:
        name: begins the lines that it prints.
        resumable: the same command goes on where a stopped one was: Ctrl-C and SIGTERM say so.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            if resumable:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                check_words()
                code = main(argv)
                sys.stdout.flush()
                return code
            except BrokenPipeError:
                # Python flushes once more when it ends, and would complain there.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return CLOSED_PIPE
            except ModuleNotFoundError as error:
                if (missing := explained(error, name)) is None:
                    raise
                return _say(name, missing, UNUSABLE)
            except ShiftInputError as error:
                return _say(name, error, UNUSABLE)
            except OSError as error:
                return _say(name, error, FAILED)
            except KeyboardInterrupt:
                if not resumable:
                    return _say(name, "interrupted", CANCELLED)
                return _say(name, "interrupted; the same command goes on from here", INTERRUPTED)

        return run

    return decorate


def launch(name: str, module: str) -> int:
    """Import the module of a command and run its ``main``; what the import misses is one line, too."""

    @command(name)
    def run(argv: Sequence[str] | None = None) -> int:
        return importlib.import_module(module).main(argv)

    return run(None)


def _say(name: str, said: object, code: int) -> int:
    words = str(said)
    print(words if words.startswith(name) else f"{name}: {words}", file=sys.stderr)
    return code
