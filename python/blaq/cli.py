"""The command ``blaq``: finds a subcommand's module, parses its arguments, and words its errors.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``, the exit status;
its docstring is its help. It is imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

__all__ = ["main"]

COMMANDS = {
    "train": ("blaq.commands.train", "train a network in full precision, by LAQ or by BLAQ"),
    "eval": ("blaq.commands.eval", "accuracy of a trained run or of a model file"),
    "pack": ("blaq.commands.pack", "write a trained run's model with bit-packed weights"),
    "inspect": ("blaq.commands.inspect", "what a packed file holds, layer by layer"),
    "bench": ("blaq.bench.command", "time the ops against the best alternatives"),
    "reproduce": ("blaq.commands.reproduce", "make a figure or table of the paper"),
    "env": ("blaq.commands.env", "versions, processor, and which backend serves each op"),
}
LIBRARY_PREFIX = re.compile(r"^blaq[\w.]*: ")
USER_ERROR = 2
INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended, as shells have it."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        from blaq import __version__

        print(f"blaq {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"blaq: command must be one of {', '.join(COMMANDS)}, got {name!r}{hint}",
              file=sys.stderr)
        return USER_ERROR
    try:
        return _run(name, arguments[1:])
    except KeyboardInterrupt as interrupt:  # a command may say how to go on
        print(f"blaq {name}: {interrupt or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


def _overview() -> str:
    lines = [f"  {name:11}{help}" for name, (_, help) in COMMANDS.items()]
    return "\n".join([
        "usage: blaq COMMAND [options]", "",
        "Loss-aware training with 1- to 4-bit weights, and inference from packed ones.", "",
        "commands:", *lines, "", "blaq COMMAND --help says more; blaq --version."])


def _run(name: str, arguments: Sequence[str]) -> int:
    module = importlib.import_module(COMMANDS[name][0])
    parser = _Parser(prog=f"blaq {name}", description=module.__doc__, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", default=bool(os.environ.get("BLAQ_DEBUG")),
                        help="show the traceback of an error (also: BLAQ_DEBUG=1)")
    try:
        args = parser.parse_args(arguments)
    except SystemExit as end:  # --help or a usage error, which argparse has printed
        return int(end.code or 0)
    try:
        code = int(module.run(args))
        sys.stdout.flush()  # while a closed pipe can still be answered for
        return code
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            traceback.print_exc()
        words = " ".join(str(error).split())
        print(f"blaq {name}: {LIBRARY_PREFIX.sub('', words)}", file=sys.stderr)
        return USER_ERROR
