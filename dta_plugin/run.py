"""Run an unmodified training script with the flag:

    python -m dta_plugin.run train.py --use_dta true --dta_verify first --learning_rate 1e-6
    accelerate launch -m dta_plugin.run train.py --use_dta true
    torchrun --nproc_per_node 2 -m dta_plugin.run train.py --use_dta true

and for `trl grpo --config recipe.yaml`, as the *last* lines of the YAML (TRL hands what follows to this module):

    module: dta_plugin.run
    use_dta: true

`--use_dta` and `--dta_*` may stand before or after the script, or as lines `use_dta: true` and `dta_*: ...` in the YAML
file that the script's own `--config` names; the command line wins. They are taken out of what the script gets to see,
validated before anything is loaded, and switch the plugin on in this process. Without `--use_dta true` the script runs
as it is.
"""

from __future__ import annotations

import atexit
import os
import re
import runpy
import sys
import tempfile
import textwrap
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError, UnsupportedModelError

_FLAG, _PREFIX = "use_dta", "dta_"
_YAML_LINE = re.compile(rf"^(?:{_FLAG}|{_PREFIX}\w+)[ \t]*:.*\n?", re.MULTILINE)
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
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
        config = parse_options(yaml_options | options)
        if not rest:
            raise InvalidInputError(f"Got no script to run. {_EXAMPLE}")
        if not os.path.isfile(rest[0]):
            raise InvalidInputError(f"There is no script {rest[0]!r}. {_EXAMPLE}")
        if config is not None:
            from dta_plugin.activation import enable

            enable(config)
    except (InvalidInputError, UnsupportedModelError) as error:
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


def take_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """-> (the plugin's options by name, everything else in order). Accepts `--x v`, `--x=v` and a bare `--use_dta`."""
    options: dict[str, str] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, _, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or not (name == _FLAG or name.startswith(_PREFIX)):
            rest.append(argument)
        elif "=" in argument:
            options[name] = value
        elif name == _FLAG and (not queue or queue[0].startswith("-") or os.path.isfile(queue[0])):
            options[name] = "true"
        elif queue and not queue[0].startswith("--"):
            options[name] = queue.pop(0)
        else:
            raise InvalidInputError(f"--{name} has no value. Expected one, as in --{name} VALUE.")
    return options, rest


def take_yaml_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The same for the YAML file that `--config` names, if there is one.

    Parsers such as TrlParser reject keys that they do not know, so where the file has lines of the plugin, the
    arguments that are returned name a copy without them, which is removed when the process ends.
    """
    at = next((i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--config"), None)
    if at is None:
        return {}, arguments
    after = at + 1 if "=" in arguments[at] else at + 2
    path = "=".join(arguments[at:after]).partition("=")[2]
    if not path.endswith((".yaml", ".yml")) or not os.path.isfile(path):
        return {}, arguments
    with open(path, encoding="utf-8") as file:
        text = file.read()
    lines = "".join(_YAML_LINE.findall(text))
    if not lines:
        return {}, arguments
    options = _parse_yaml(lines, path)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False, encoding="utf-8") as copy:
        copy.write(_YAML_LINE.sub("", text))
    atexit.register(os.unlink, copy.name)
    return options, [*arguments[:at], "--config", copy.name, *arguments[after:]]


def _parse_yaml(lines: str, path: str) -> dict[str, str]:
    import yaml

    try:
        return {name: str(value) for name, value in yaml.safe_load(lines).items()}
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise InvalidInputError(f"{path}: {what}. Expected lines such as 'use_dta: true'.") from None


def parse_options(options: dict[str, str]) -> TreeConfig | None:
    """Validated configuration, or None where the flag is off. Raises InvalidInputError for anything it cannot use."""
    flag = options.get(_FLAG)
    if flag is not None and flag.lower() not in _BOOLS:
        raise InvalidInputError(f"--{_FLAG} {flag}. Expected true or false.")
    types = get_type_hints(TreeConfig)
    texts = {name.removeprefix(_PREFIX): text for name, text in options.items() if name != _FLAG}
    for name in texts:
        if name not in types:
            known = ", ".join(f"--{_PREFIX}{field}" for field in types)
            raise InvalidInputError(f"Unknown option --{_PREFIX}{name}. Expected among: {known}.")
    if flag is None and texts:
        given = ", ".join(f"--{_PREFIX}{name}" for name in texts)
        raise InvalidInputError(f"Got {given} without --{_FLAG}. Expected --{_FLAG} true beside it.")
    try:
        config = TreeConfig(**{name: _convert(name, text, types[name]) for name, text in texts.items()})
    except InvalidInputError as error:
        raise InvalidInputError(f"--{_PREFIX}{error}") from None
    return config if flag is not None and _BOOLS[flag.lower()] else None


def _convert(name: str, text: str, kind: Any) -> Any:
    """An option's value as the type of its field; "none" where the field allows None."""
    kinds = get_args(kind) or (kind,)
    if type(None) in kinds and text.lower() == "none":
        return None
    convert = next(k for k in kinds if k is not type(None))
    try:
        return convert(text)
    except ValueError:
        raise InvalidInputError(f"{name}={text!r}. Expected a value of type {convert.__name__}.") from None


def usage() -> str:
    """The module's description and one paragraph per option."""
    options: list[tuple[str, object, str]] = [(_FLAG, False, "Switch the plugin on: true or false.")]
    options += [(_PREFIX + f.name, f.default, f.metadata["help"]) for f in fields(TreeConfig)]
    lines = [(__doc__ or "").strip(), "", "options:"]
    for name, default, text in options:
        lines.append(f"  --{name} (default {default})")
        lines += textwrap.wrap(
            text, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
