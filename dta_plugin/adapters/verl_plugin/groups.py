"""The rows of a batch that verl's trainer has sampled: who is whose sibling, and what they share.

What rows share must be known before they are dealt out, on the driver, where verl's v1 trainer has keys and tags but no
tokens. Rows of one uid come from one prompt, so `prompt_len` says what they share: all there is to know as long as
every session gave one row. Where sessions gave several (turns, sub-agents), a row's prompt holds parts of other rows;
the token ids of those groups are fetched from the TransferQueue, once per step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from dta_plugin.training.placement.steps import GroupedRows


class UnusableBatch(Exception):
    """A batch whose groups cannot be told. The message is the reason."""


def uids_of(batch: Any) -> list[str]:
    """Per row its uid. Raises UnusableBatch for what `grouped_rows` could not read."""
    if hasattr(batch, "tags"):  # KVBatchMeta
        for tag in batch.tags:
            if tag.get("prompt_len") is None or tag.get("seq_len") is None:
                names = ", ".join(map(str, tag)) or "(none)"
                raise UnusableBatch(f"a row has the tags {names}; expected prompt_len and seq_len among them")
        return [_parts(key)[0] for key in batch.keys]
    if hasattr(batch, "non_tensor_batch"):  # DataProto
        if "uid" not in batch.non_tensor_batch:
            raise UnusableBatch("its rows have no uid, which verl gives to every prompt of a training batch")
        return [str(uid) for uid in batch.non_tensor_batch["uid"]]
    raise UnusableBatch(f"it is a {type(batch).__name__}; expected KVBatchMeta (v1 trainers) or DataProto (v0)")


def grouped_rows(batch: Any, order: Iterable[str]) -> GroupedRows:
    """order: uids in the order that groups are to keep; others, those of padding, come after them."""
    uids = uids_of(batch)
    number = {uid: place for place, uid in enumerate(dict.fromkeys([*order, *uids]))}
    groups = [number[uid] for uid in uids]
    if hasattr(batch, "tags"):
        return _rows_from_tags(batch, groups)
    mask = batch.batch["attention_mask"].bool().numpy()
    rows = [ids[real] for ids, real in zip(batch.batch["input_ids"].numpy(), mask, strict=True)]
    return GroupedRows(
        [np.insert(row, 0, group) for group, row in zip(groups, rows, strict=True)], list(map(len, rows))
    )


def _rows_from_tags(batch: Any, groups: list[int]) -> GroupedRows:
    lengths = [tag["seq_len"] for tag in batch.tags]
    tokens = _fetched_tokens(batch, _rows_beyond_tags(batch, groups))
    free = max(groups) + 1  # token ids from here on stand for a row each
    sequences = []
    for row, (group, tag) in enumerate(zip(groups, batch.tags, strict=True)):
        if tag.get("is_padding", False):
            sequences.append(np.array([free + row]))
        elif row in tokens:
            sequences.append(np.insert(tokens[row], 0, group))
        else:
            prompt = tag["prompt_len"]
            sequences.append(np.repeat([group, free + row], [1 + prompt, lengths[row] - prompt]))
    return GroupedRows(sequences, lengths)


def _rows_beyond_tags(batch: Any, groups: list[int]) -> list[int]:
    """Rows whose groups share more than a prompt."""
    seen: dict[int, tuple[set[str], set[int], list[int]]] = {}
    for row, (group, key, tag) in enumerate(zip(groups, batch.keys, batch.tags, strict=True)):
        if not tag.get("is_padding", False):
            sessions, prompts, rows = seen.setdefault(group, (set(), set(), []))
            sessions.add(_parts(key)[1])
            prompts.add(tag["prompt_len"])
            rows.append(row)
    beyond = (rows for sessions, prompts, rows in seen.values() if len(sessions) < len(rows) or len(prompts) > 1)
    return [row for rows in beyond for row in rows]


def _fetched_tokens(batch: Any, rows: list[int]) -> dict[int, np.ndarray]:
    """Token ids of some rows."""
    if not rows:
        return {}
    from verl.utils.transferqueue_utils import tq

    keys = [batch.keys[row] for row in rows]
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["input_ids"])
    return dict(zip(rows, (ids.cpu().numpy() for ids in data["input_ids"].unbind()), strict=True))


def _parts(key: str) -> list[str]:
    """uid, session, and which of the session's rows."""
    parts = str(key).rsplit("_", 2)
    if len(parts) < 3:
        raise UnusableBatch(f"it has a row with the key {key!r}; expected uid_session_index")
    return parts
