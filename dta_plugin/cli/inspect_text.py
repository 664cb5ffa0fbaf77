"""The report of `dta inspect` as text, at most 100 columns wide."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from dta_plugin.cli.inspection import GroupFork, Inspection
from dta_plugin.cli.rollouts import EQUAL_PROMPTS
from dta_plugin.cli.terminal import one_line, printable
from dta_plugin.tree.divergence import Branch
from dta_plugin.tree.picture import draw_text

_WIDTH = 100
_PICTURE_LINES = 24
_BRANCHES = 4  # branches listed per fork


def as_text(found: Inspection, about: dict[str, Any]) -> Iterator[str]:
    """The lines of the report. about: what the caller knows of the file, the tokens and the model."""
    units = about["unit"] + ("" if found.whole.sequences == 1 else "s")
    groups = f"{found.within.trees} group{'' if found.within.trees == 1 else 's'}"
    origin = f" of {about['rollouts']:,} rollouts" if about["unit"] != "rollout" else ""
    file, grouped_by = printable(about["file"]), printable(about["grouped_by"])
    yield f"{file}: {found.whole.sequences:,} {units}{origin} in {groups} (by {grouped_by})"
    yield printable(about["tokens"])
    yield from _rewards(about)
    if alone := alone_note(found, about):
        yield alone
    yield ""
    yield from _table(found, about["model"])
    yield ""
    yield from _beginnings(found)
    if found.forks:
        yield "\nWhere siblings part, most repeated tokens first"
    for number, item in enumerate(found.forks, 1):
        yield from _fork(number, item)
    yield f"\nGroup {printable(found.shown)}: {found.tree.num_sequences} sequences, {found.tree.compression_ratio:.2f}x"
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    yield draw_text(found.tree, max_lines=_PICTURE_LINES, width=_WIDTH, ascii_only=ascii_only)


def _rewards(about: dict[str, Any]) -> Iterator[str]:
    rewards = about["rewards"]
    if rewards["read_from"]:
        key, known = printable(rewards["read_from"]), f"{rewards['rollouts']:,} of {about['rollouts']:,}"
        yield f"reward: {key}, known of {known}, mean {rewards['mean']:.4g}"
    if rewards["not_read"]:
        yield f"reward not read: {one_line(rewards['not_read'])}"


def alone_note(found: Inspection, about: dict[str, Any]) -> str:
    """Where no two rollouts are of one group: why, probably, and what to do; "" else."""
    if found.within.trees < max(about["rollouts"], 2) or about["grouped_by"] == EQUAL_PROMPTS:
        return ""
    key = printable(about["grouped_by"])
    return f"No two rollouts have the same {key}: it may name rollouts, not prompts. Try --group-by '{EQUAL_PROMPTS}'."


def _table(found: Inspection, model: str) -> Iterator[str]:
    rows = [("group", found.within), ("whole file", found.whole)]
    yield f"one tree per{'trees':>7}{'sequences':>11}{'flat tokens':>14}{'tree tokens':>14}{'sharing':>9}  FLOP ceiling"
    for name, row in rows if found.within.trees > 1 else rows[1:]:
        yield (
            f"{name:<12}{row.trees:>7,}{row.sequences:>11,}{row.flat_tokens:>14,}{row.tree_tokens:>14,}"
            f"{row.ratio:>8.2f}x{row.ceiling:>13.2f}x"
        )
    yield f"FLOP ceiling: the largest possible speed-up of {printable(model)}, forward and backward"


def _beginnings(found: Inspection) -> Iterator[str]:
    if found.within.trees > 1:
        yield f"All {found.within.trees} groups begin with the same {found.common:,} tokens."
    first = found.first_forks
    if first is None:
        yield "Within a group, no two sequences part: each repeats or continues another."
    elif found.within.trees == 1:
        yield f"The sequences first part after {first.lowest:,} tokens."
    else:
        spread = f"{first.median:,} tokens (median; {first.lowest:,} to {first.highest:,})"
        yield f"Within a group, sequences first part after {spread}."


def _fork(number: int, item: GroupFork) -> Iterator[str]:
    fork = item.fork
    share = f", {fork.repeated / fork.apart:.0%}" if fork.apart else ""
    yield (
        f"{number:>2}. group {printable(item.group)}, after {fork.depth:,} tokens: {fork.sequences} sequences part; "
        f"{fork.repeated:,} tokens repeated (of {fork.apart:,}{share})"
    )
    if fork.context:
        yield f"    {_clip(fork.context, _WIDTH - 4, from_end=True)}"
    for branch in fork.branches[:_BRANCHES]:
        count = f"{branch.tree_tokens:,} tokens"
        yield f"    x{branch.sequences:<4}{count:>14}  {_opening(branch, _WIDTH - 25)}"
    if len(fork.branches) > _BRANCHES:
        yield f"    and {len(fork.branches) - _BRANCHES} more branches"
    if fork.longest_repeat is not None:
        repeat = fork.longest_repeat
        text = f": {_clip(repeat.text, _WIDTH - 58)}" if repeat.text else ""
        yield f"    longest repeat: {repeat.tokens:,} tokens, {repeat.after:,} after the fork{text}"
    if fork.cause:
        yield f"    likely: {fork.cause}"


def _opening(branch: Branch, width: int) -> str:
    """How a branch begins: its text, or its token ids."""
    if branch.text is not None:
        return _clip(branch.text, width)
    ids = " ".join(map(str, branch.opening))
    return ids if len(ids) <= width else ids[: width - 2].rsplit(" ", 1)[0] + " .."


def _clip(text: str, width: int, from_end: bool = False) -> str:
    """The text in quotes on one line of `width` columns, with line breaks written out."""
    line = printable(json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"'))
    if len(line) > width - 2:
        line = ".." + line[4 - width :] if from_end else line[: width - 4] + ".."
    return f'"{line}"'
