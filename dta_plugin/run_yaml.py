"""The plugin's entries in the YAML of a script: found by YAML's own rules, and taken out of the copy that it reads.

Everything else stays in the copy as it was written, comments, anchors and numbers included. Where an entry cannot be
cut out without changing another (an anchor that others refer to), the rest is written anew with the same content. A
file that is no YAML mapping, or has no entry of the plugin, is handed on itself. A copy is removed when the process
ends, by an exception and by SIGTERM, too.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import yaml

from dta_plugin.errors import InvalidInputError
from dta_plugin.run_options import FLAG, Given, option_name, warn, warn_of_slip

_Entry = tuple[yaml.Node, yaml.Node]
_MERGE = "tag:yaml.org,2002:merge"


def take_yaml_options(arguments: list[str]) -> tuple[dict[str, Given], list[str]]:
    """-> (the plugin's options in the files that `--config` names, the arguments with copies in place of these)."""
    options: dict[str, Given] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, path = argument.partition("=")
        if name != "--config" or not (equals or queue):
            rest.append(argument)
            continue
        if not equals:
            path = queue.pop(0)
        taken = _take(path) if os.path.isfile(path) else None
        if taken is None:
            rest += [argument] if equals else [argument, path]
        else:
            options |= taken[0]
            rest += ["--config", _copy(taken[1], os.path.basename(path))]
    return options, rest


def _take(path: str) -> tuple[dict[str, Given], str] | None:
    """(options, the text without them) of a file; None where it has none. Of equal keys the last counts."""
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError:
        return None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        root = None
    if not isinstance(root, yaml.MappingNode):
        if re.search(rf"\b{FLAG}\b", text):
            warn(f"{path} names {FLAG}, but is no YAML mapping: it is left to the script as it is.")
        return None
    options: dict[str, Given] = {}
    for key, value in root.value:
        if (name := _option(key)) is not None:
            options[name] = _given(name, value, f"{path}: {key.value}")
        elif isinstance(key, yaml.ScalarNode):
            warn_of_slip(key.value, f"{path}: {key.value}")
        if key.tag == _MERGE and (merged := next(_options_in(value), None)):
            raise InvalidInputError(
                f"{path}: {merged} comes from a mapping that << merges. Expected it as an entry of the file itself."
            )
    return (options, _without_options(text, root)) if options else None


def _option(key: yaml.Node) -> str | None:
    return option_name(key.value) if isinstance(key, yaml.ScalarNode) else None


def _options_in(merged: yaml.Node) -> Iterator[str]:
    """Names of the plugin in what `<<` merges: a mapping, or a list of them."""
    for node in merged.value if isinstance(merged, yaml.SequenceNode) else [merged]:
        yield from (name for key, _ in node.value if (name := _option(key)) is not None)


def _given(name: str, node: yaml.Node, where: str) -> Given:
    """The option as YAML reads it; InvalidInputError for anything but one plain value."""
    try:
        if isinstance(node, yaml.ScalarNode):
            return Given(str(yaml.SafeLoader("").construct_object(node)).strip(), where)
    except (yaml.YAMLError, ValueError):
        pass
    shown = " ".join(yaml.serialize(node, Dumper=yaml.SafeDumper).split()).removesuffix(" ...")
    expected = "true or false" if name == FLAG else "one plain value"
    raise InvalidInputError(f"{where}={shown!r}. Expected {expected}.")


def _without_options(text: str, root: yaml.MappingNode) -> str:
    """The text without the plugin's entries: cut out if what is left then reads the same, else written anew."""
    kept = [(key, value) for key, value in root.value if _option(key) is None]
    rest = yaml.MappingNode(root.tag, kept, flow_style=root.flow_style)
    anew: str = yaml.serialize(rest, Dumper=yaml.SafeDumper)
    spans = _flow_spans(root.value) if root.flow_style else _block_spans(text, root.value)
    cut, at = "", 0
    for start, end in sorted(spans):
        cut, at = cut + text[at:start], max(at, end)
    cut += text[at:]
    try:
        is_same = yaml.serialize(yaml.compose(cut, yaml.SafeLoader), Dumper=yaml.SafeDumper) == anew
    except (yaml.YAMLError, AttributeError):  # the latter where nothing is left
        is_same = False
    return cut if is_same else anew


def _block_spans(text: str, entries: list[_Entry]) -> Iterator[tuple[int, int]]:
    """Whole lines, with the comment at their end."""
    for key, value in entries:
        if _option(key) is not None:
            end = _end((key, value))
            if text[end - 1 : end] != "\n":  # a block scalar ends where the next line begins
                end = (text.find("\n", end) + 1) or len(text)
            yield text.rfind("\n", 0, key.start_mark.index) + 1, end


def _flow_spans(entries: list[_Entry]) -> Iterator[tuple[int, int]]:
    """From one entry to the next; at the end, from the last one that stays."""
    last = next((entry for entry in reversed(entries) if _option(entry[0]) is None), entries[0])
    for entry, after in zip(entries, [*entries[1:], None], strict=True):
        if _option(entry[0]) is not None:
            start = entry[0].start_mark.index
            yield (start, after[0].start_mark.index) if after is not None else (_end(last), _end(entry))


def _end(entry: _Entry) -> int:
    """Where an entry ends. The node of an alias has the marks of its anchor, which come before the key."""
    return max(node.end_mark.index for node in entry)


def _copy(text: str, name: str) -> str:
    """The path of a new file of this name, which ends with the process."""
    path = Path(tempfile.mkdtemp(dir=_folder())) / name
    path.write_bytes(text.encode())
    return str(path)


@functools.cache
def _folder() -> str:
    """This process's own, removed with it. SIGTERM still ends it, unless the script handles that itself."""
    folder, owner = tempfile.mkdtemp(prefix="dta_plugin_"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not in a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    def end(number: int, frame: FrameType | None) -> None:
        remove()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    atexit.register(remove)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    return folder
