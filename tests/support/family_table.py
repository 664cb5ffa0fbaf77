"""What a sweep found (tests/support/sweep.py), as the page docs/families.md."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version

from tests.support.models import WINDOW
from tests.support.sweep import EXACT, NOT_BUILDABLE, NOTICED, REFUSED, STREAMED, TOLERANCE, Outcome, Row, cause
from tests.support.tiny_families import options_of

_INTRO = """\
# Model families

Every causal LM class of transformers {transformers}, tiny and with every parameter random, run as a prefix tree and by
its own forward. Written by `make families` (Python {python}, torch {torch}), not by hand.

Compared are log-probs, entropies and the gradient of every parameter, in training mode and float64, packed and
streamed in chunks of at most {budget} tokens, on two trees with forks at several depths, an end inside, one-token
branches and paths longer than any window. *Exact*: no difference above {tolerance:g} (transformers' float32 norms and
softmaxes leave about 1e-7; models with recurrent layers are compared without them); with siblings made visible to each
other, every one differs by more than {noticed:g}. *With options*: once more, with features that are off by default. A
refused model runs by its own forward with `on_unsupported="dense"`.

{count} families: {exact} exact, {refused} refused with the reason, {missing} that cannot be built. {bugs} are silently
wrong, raise anything else, or are not what `dta doctor` says of their config. Classes with images count by their text.
Numbers in reasons, such as a window of {window}, are those of the tiny models.
"""


_IMAGES = """\
## With images

Every class of `AutoModelForImageTextToText`, with one to three images in a row, alike and different, through the vision
tower and the tree, against its own forward: gradients of the tower are compared, too. With images told apart by their
placeholders' ids alone, every one differs by more than {noticed:g}. Llama 4's own forward fails with images in this
release, and is compared with that one line repaired. LLaVA-OneVision sees several images of a row otherwise than one
alone: rows with more than one are refused. Videos and sound are refused by name.

{count} families: {exact} exact, {refused} refused with the reason, {missing} not tried.
"""


def table(rows: Sequence[Row], images: Sequence[tuple[str, Outcome]] = ()) -> str:
    """The whole page. images: per family that takes them, what came out with images."""
    results = [row.plain.result for row in rows]
    bugs = [row for row in rows if not all(outcome.is_fine for outcome in row.outcomes)]
    intro = _INTRO.format(
        python=platform.python_version(),
        torch=version("torch").partition("+")[0],
        transformers=version("transformers"),
        budget=STREAMED.max_tree_tokens_per_chunk,
        tolerance=TOLERANCE,
        noticed=NOTICED,
        window=WINDOW,
        count=len(rows),
        exact=results.count(EXACT),
        refused=results.count(REFUSED),
        missing=results.count(NOT_BUILDABLE),
        bugs=len(bugs) or "None",
    )
    sections = [intro, "## Exact", _exact(rows), "## Refused", _refused(rows), "## Not buildable", _missing(rows)]
    if bugs:
        sections += ["## Bugs", _table(("family", "what happened"), [(row.family, str(row.outcomes)) for row in bugs])]
    sections += _with_images(images) if images else []
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _with_images(found: Sequence[tuple[str, Outcome]]) -> list[str]:
    results = [outcome.result for _, outcome in found]
    intro = _IMAGES.format(
        noticed=NOTICED,
        count=len(found),
        exact=results.count(EXACT),
        refused=results.count(REFUSED),
        missing=results.count(NOT_BUILDABLE),
    )
    rows = [Row(family, outcome) for family, outcome in found]
    exact = [(row.family, row.plain.model, row.plain.note) for row in rows if row.plain.result == EXACT]
    bugs = [(row.family, str(row.plain)) for row in rows if row.plain.result not in (EXACT, REFUSED, NOT_BUILDABLE)]
    sections = [intro, _table(("family", "class", "largest difference"), exact), "### Refused with images"]
    sections += [_refused(rows), "### Not tried with images", _missing(rows)]
    return sections + (["### Bugs with images", _table(("family", "what happened"), bugs)] if bugs else [])


def _exact(rows: Iterable[Row]) -> str:
    cells = [
        (row.family, row.outcomes[0].model, _found(row.plain), _with_options(row))
        for row in rows
        if any(outcome.result == EXACT for outcome in row.outcomes)
    ]
    return _table(("family", "class", "largest difference", "with options"), cells)


def _with_options(row: Row) -> str:
    if row.options is None:
        return ""
    return f"{_found(row.options)}: {', '.join(f'`{name}`' for name in options_of(row.family))}"


def _found(outcome: Outcome) -> str:
    return outcome.note if outcome.result == EXACT else outcome.result


def _refused(rows: Iterable[Row]) -> str:
    families: dict[tuple[str, str], list[str]] = {}
    for name, outcome in _refusals(rows):
        why, remedy = cause(outcome.doctor or outcome.note)
        families.setdefault((why.removeprefix(outcome.model).strip(), remedy), []).append(name)
    cells = [(*why, ", ".join(names)) for why, names in families.items()]
    return _table(("why", "what to do", "families"), cells)


def _refusals(rows: Iterable[Row]) -> Iterator[tuple[str, Outcome]]:
    for row in rows:
        if row.plain.result == REFUSED:
            yield row.family, row.plain
        elif row.options is not None and row.options.result == REFUSED:
            yield f"{row.family} with options", row.options


def _missing(rows: Iterable[Row]) -> str:
    missing = [(row.family, row.plain.note) for row in rows if row.plain.result == NOT_BUILDABLE]
    return _table(("family", "what transformers says"), [(name, _shortened(note)) for name, note in missing])


def _shortened(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
