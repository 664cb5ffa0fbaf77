"""The page of `dta inspect --html`: one file that explores a file of rollouts, from disk and without a network.

The page is inspect.html beside this module, a template with its style and its script. What it is told of the file goes
in as JSON, ASCII only and without a "<", so that no text of a rollout can end the element that holds it; the script
shows it as text, never as markup. Its policy allows that style and that script by their digests and nothing else: no
other script runs, and nothing is loaded or sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from typing import Any

from dta_plugin import __version__
from dta_plugin.cli.inspect_text import alone_note
from dta_plugin.cli.inspection import Inspection, Sharing
from dta_plugin.cli.page_data import LeftOut, Limits, page_data
from dta_plugin.cli.rollouts import TokenizedSequence
from dta_plugin.cli.terminal import one_line, printable
from dta_plugin.tree.divergence import Decoder


@dataclass(frozen=True, slots=True)
class PageOptions:
    """nodes: most nodes of trees on the page. megabytes: about so much text. only: the one group to show, None: all."""

    nodes: int = 100_000
    megabytes: float = 16.0
    only: str | None = None


def as_html(
    found: Inspection,
    sequences: Sequence[TokenizedSequence],
    about: dict[str, Any],
    decoder: Decoder | None,
    run_length: int,
    options: PageOptions,
) -> str:
    """The page. about: what the caller knows of the file, the tokens and the model."""
    limits = Limits(options.nodes, int(options.megabytes * 1e6 / _bytes_per_token(decoder, run_length)))
    data, left_out = page_data(found, sequences, decoder, run_length, limits, options.only)
    data |= {
        "about": about | {"version": __version__},
        "within": _sharing(found.within),
        "whole": _sharing(found.whole),
        "common": found.common,
        "notes": [*_read(found, about), *_notes(found, left_out, options)],
    }
    return page(f"{printable(about['file'])} - dta inspect", data)


def page(title: str, data: dict[str, Any]) -> str:
    """The template with a title and data in it."""
    template = resources.files("dta_plugin.cli").joinpath("inspect.html").read_text(encoding="utf-8")
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL) for tag in ("style", "script"))
    assert style is not None and script is not None
    policy = f"default-src 'none'; style-src {_digest(style[1])}; script-src {_digest(script[1])}"
    policy += "; base-uri 'none'; form-action 'none'"
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"policy": policy, "title": escape(title), "data": content}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _bytes_per_token(decoder: Decoder | None, run_length: int) -> int:
    """About: of a token id with its space, of a tokenizer's token, of a byte."""
    if decoder is None:
        return 6
    return 4 if run_length < 64 else 1


def _sharing(sharing: Sharing) -> dict[str, Any]:
    return asdict(sharing) | {"ratio": sharing.ratio, "ceiling": sharing.ceiling}


def _read(found: Inspection, about: dict[str, Any]) -> Iterator[str]:
    """What the file seems to say and was not read."""
    if about["rewards"]["not_read"]:
        yield f"reward not read: {one_line(about['rewards']['not_read'])}"
    if alone := alone_note(found, about):
        yield alone


def _notes(found: Inspection, left_out: LeftOut, options: PageOptions) -> list[str]:
    """What is not on the page, and the option that would bring it."""
    notes = []
    if options.only is not None and len(found.groups) > 1:
        notes.append(f"Only one of {len(found.groups):,} groups is here (--group).")
    if left_out.groups:
        notes.append(
            f"The groups that share most are here; {left_out.groups:,} others are left out. Any of them with --group."
        )
    if left_out.nodes:
        notes.append(
            f"The largest {options.nodes:,} nodes are here; {left_out.nodes:,} smaller ones are left out. More with "
            "--html-nodes, or one group in full with --group."
        )
    if left_out.tokens:
        notes.append(
            f"About {options.megabytes:g} MB of text are here; {left_out.tokens:,} tokens in the middle of long nodes "
            "are left out, also from the search. More with --html-mb, or one group in full with --group."
        )
    if left_out.unsearched:
        notes.append(
            f"Forks were looked for in the groups that share most; in {left_out.unsearched:,} others they were not. "
            "One group in full with --group."
        )
    return notes
