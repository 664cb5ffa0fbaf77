"""The command line's words: what is mistyped is refused in one line, with what was probably meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from dta_plugin.cli.terminal import one_line
from dta_plugin.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argparse parser, also of its subcommands, that says one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: {one_line(message)}{end} See: {self.prog} --help\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        own = takewhile(lambda word: word != "--" and (self._subparsers is None or word.startswith("-")), words)
        for word in own:  # before argparse takes the value of an unknown option for something else
            name, known = word.partition("=")[0], list(self._option_string_actions)
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                self.error(f"there is no option {name}.{did_you_mean(name, known)}")
        found, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"got {' '.join(rest)!r}, which is more than it takes. Expected one file, or a folder of files.")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        what = "command" if action.dest == "command" else f"{'/'.join(action.option_strings) or action.dest}"
        hint = did_you_mean(str(value), known)
        if action.dest == "command" and not hint and Path(str(value)).exists():
            hint = f" To look at what it holds: dta inspect {value}."
        self.error(f"{value!r} is no {what}.{hint} Expected one of: {', '.join(known)}.")
