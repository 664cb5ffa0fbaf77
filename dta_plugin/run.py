"""Run an unmodified training script with the flag:

    python -m dta_plugin.run train.py --use_dta true --dta_verify first --learning_rate 1e-6
    accelerate launch -m dta_plugin.run train.py --use_dta true
    torchrun --nproc_per_node 2 -m dta_plugin.run train.py --use_dta true

and for `trl grpo --config recipe.yaml`, as the *last* lines of the YAML (TRL hands what follows to this module):

    module: dta_plugin.run
    use_dta: true

`--use_dta` and `--dta_*` may stand before or after the script, or as entries `use_dta: true` and `dta_*: ...` of the
YAML file that the script's own `--config` names; the command line wins. They are taken out of what the script gets to
see, validated before anything is loaded, and switch the plugin on in this process. With `--use_dta true` those given
also win over what the config of a trainer says; without it the script runs as it is.
"""

from __future__ import annotations

import os
import runpy
import sys
import textwrap
from dataclasses import fields

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.run_options import FLAG, PREFIX, Given, option_name, parse_options, warn_of_slip
from dta_plugin.run_yaml import take_yaml_options

_EXAMPLE = "Expected: python -m dta_plugin.run train.py --use_dta true (--help explains the options)."


def main(argv: list[str] | None = None) -> None:
    """Take the plugin's options out of `argv`, switch it on if asked, and run the script as `__main__`."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage())
        return
    try:
        options, rest = take_options(arguments)
        yaml_options, rest = take_yaml_options(rest)
        given = yaml_options | options
        config = parse_options(given)
        if not rest:
            raise InvalidInputError(f"Got no script to run. {_EXAMPLE}")
        if rest[0].startswith("-"):
            raise InvalidInputError(
                f"Got {rest[0]}, which is no option of the plugin's, and no script before it. {_EXAMPLE}"
            )
        if not os.path.isfile(rest[0]):
            raise InvalidInputError(f"There is no script {rest[0]!r}. {_EXAMPLE}")
        if config is not None:
            from dta_plugin.activation import enable_by_flags

            enable_by_flags(config, given)
    except (InvalidInputError, UnsupportedError) as error:
        sys.exit(f"dta_plugin.run: {error}")
    script = os.path.abspath(rest[0])
    sys.argv = [script, *rest[1:]]
    sys.path[0] = os.path.dirname(script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if config is not None and not end.code:
            _say_if_unused()
        raise
    if config is not None:
        _say_if_unused()


def _say_if_unused() -> None:
    from dta_plugin.adapters.trl.idle import say_if_nothing_trained

    if os.environ.get("RANK", "0") == "0":
        say_if_nothing_trained()


def take_options(arguments: list[str]) -> tuple[dict[str, Given], list[str]]:
    """-> (the plugin's options by name, everything else in order). Accepts `--x v`, `--x=v` and a bare `--use_dta`."""
    options: dict[str, Given] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        written, equals, value = argument.partition("=")
        name = option_name(written.removeprefix("--")) if argument.startswith("--") else None
        if name is None:
            rest.append(argument)
            if argument.startswith("-"):
                warn_of_slip(written, written)
            continue
        if not equals:
            if name == FLAG and (not queue or queue[0].startswith("-") or os.path.isfile(queue[0])):
                value = "true"
            elif queue and not queue[0].startswith("--"):
                value = queue.pop(0)
            else:
                raise InvalidInputError(f"--{name} has no value. Expected one, as in --{name} VALUE.")
        options[name] = Given(value, f"--{name}")
    return options, rest


def usage() -> str:
    """The module's description and one paragraph per option."""
    options: list[tuple[str, object, str]] = [(FLAG, False, "Switch the plugin on: true or false.")]
    options += [(PREFIX + f.name, f.default, f.metadata["help"]) for f in fields(TreeConfig)]
    lines = [(__doc__ or "").strip(), "", "options:"]
    for name, default, text in options:
        lines.append(f"  --{name} (default {default})")
        lines += textwrap.wrap(
            text, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
