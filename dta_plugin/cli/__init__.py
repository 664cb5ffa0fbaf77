"""The `dta` command: look at rollouts, at this machine, and at a model before training with the tree.

    dta inspect rollouts.jsonl       what the sequences share, and what that would save
    dta doctor --model PATH          would prefix-tree training run here, with this model?
    dta verify --model PATH          tree against dense: log-probs and gradients
    dta calibrate --model PATH       how fast it trains here, measured once; training then decides by it

Exit codes: 0 all well; 1 the check failed (`doctor`, `verify`); 2 the input cannot be used, said in one line; 130
interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from dta_plugin import __version__
from dta_plugin.cli import calibrate_command, doctor_command, inspect_command, verify_command
from dta_plugin.cli.arguments import Parser
from dta_plugin.cli.terminal import one_line, reason
from dta_plugin.errors import InvalidInputError, UnsupportedError

_EPILOG = """\
first steps:
  dta inspect rollouts.jsonl.gz --tokenizer Qwen/Qwen3-0.6B
  dta doctor --model Qwen/Qwen3-0.6B
  dta verify --model Qwen/Qwen3-0.6B

Each subcommand explains itself: dta inspect --help
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dta",
        description="Prefix-tree training: what your rollouts share, and whether sharing it works here.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dta-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (inspect_command, doctor_command, verify_command, calibrate_command):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dta` with these arguments (default: the command line's) and return its exit code."""
    try:
        try:
            return _run(build_parser().parse_args(arguments))
        finally:
            sys.stdout.flush()
    except OSError as error:  # the reader (head, less) has seen enough, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"dta: {one_line(reason(error))}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    """The subcommand's exit code; whatever it raises is one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # rollouts hold characters that a terminal may not know
    try:
        return args.run(args)
    except OSError:
        raise
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except UnsupportedError as error:
        code, message = 1, error.reason  # `dta` has no option that falls back
    except InvalidInputError as error:
        code, message = 2, str(error)
    except Exception as error:
        code, message = 2, _unforeseen(error)
    print(f"dta {args.command}: {one_line(message)}", file=sys.stderr)
    return code


def _unforeseen(error: Exception) -> str:
    """What went wrong, and the last of this package's lines that took part in it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "dta_plugin" in frame.filename] or frames
    place = f"{'/'.join(Path(own[-1].filename).parts[-3:])}, line {own[-1].lineno}"
    return f"{type(error).__name__}: {reason(error)} ({place}). This was not foreseen: please report it."
