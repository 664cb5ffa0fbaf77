"""Batches as verl's trainers sample them, v1 (keys and tags) and v0 (tensors), and trainers that only balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.transferqueue_utils import KVBatchMeta

from dta_plugin.adapters.verl_plugin import balance

EOS = 2


@dataclass(frozen=True)
class Row:
    """One row: token ids [prompt + response], and of which session of which uid it is the index-th."""

    uid: str
    session: int
    index: int
    prompt_len: int
    tokens: np.ndarray

    @property
    def key(self) -> str:
        return f"{self.uid}_{self.session}_{self.index}"


def star_rows(groups: int, n: int, prompt: int, median: float, seed: int = 0) -> list[Row]:
    """GRPO: n responses of lognormal length to each prompt."""
    generator = np.random.default_rng(seed)
    rows = []
    for group in range(groups):
        shared = generator.integers(10, 50_000, prompt)
        for session in range(n):
            response = generator.integers(10, 50_000, max(1, int(generator.lognormal(np.log(median), 0.8))))
            rows.append(Row(f"u{group}", session, 0, prompt, np.concatenate([shared, response])))
    return rows


def turn_rows(groups: int, sessions: int, turns: int, seed: int = 0) -> list[Row]:
    """Agents: each session has 1 to `turns` turns, every one a row whose prompt holds all turns before."""
    generator = np.random.default_rng(seed)
    rows = []
    for group in range(groups):
        prompt = generator.integers(10, 50_000, 40)
        for session in range(sessions):
            history = prompt
            for index in range(int(generator.integers(1, turns + 1))):
                whole = np.concatenate([history, generator.integers(10, 50_000, generator.integers(5, 60))])
                rows.append(Row(f"u{group}", session, index, len(history), whole))
                history = np.concatenate([whole, generator.integers(10, 50_000, 7)])
    return rows


def in_random_order(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """As rollouts come in."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


class Queue:
    """What TransferQueue holds of a batch, and what was asked of it."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row.key: row for row in rows}
        self.read: list[str] = []
        self.put: list[str] = []

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
        self.read += keys
        ids = [torch.from_numpy(self.rows[key].tokens) for key in keys]
        if select_fields is None:  # the template of a padding row
            return [{"input_ids": ids[0], "position_ids": torch.arange(len(ids[0]))}]
        assert select_fields == ["input_ids"]
        return TensorDict({"input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged)}, [len(ids)])

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any, tags: list[dict[str, Any]]) -> None:
        self.put += keys


def kv_batch(rows: Sequence[Row]) -> KVBatchMeta:
    """What v1's replay buffer samples."""
    tags = [{"prompt_len": row.prompt_len, "seq_len": len(row.tokens)} for row in rows]
    return KVBatchMeta(partition_id="train", keys=[row.key for row in rows], tags=tags, extra_info={"temperature": 1.0})


def data_proto(rows: Sequence[Row]) -> DataProto:
    """What v0's rollout returns: prompts padded left, responses right. "place" tells rows apart."""
    prompt = max(row.prompt_len for row in rows)
    response = max(len(row.tokens) - row.prompt_len for row in rows)
    ids = torch.zeros(len(rows), prompt + response, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        begin = prompt - row.prompt_len
        ids[place, begin : begin + len(row.tokens)] = torch.from_numpy(row.tokens)
        mask[place, begin : begin + len(row.tokens)] = 1
    uids = np.array([row.uid for row in rows], dtype=object)
    tensors = {"input_ids": ids, "attention_mask": mask, "place": torch.arange(len(rows))}
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": uids})


def trainer(version: str, ranks: int, mini_batch: int, n: int, shuffle: bool = False, **options: Any) -> Any:
    """A trainer of verl's v1 or v0 with what `_balance_batch` reads. mini_batch: prompts. options: of the plugin."""
    if version == "v1":
        kind = pytest.importorskip("verl.trainer.ppo.v1.trainer_sync", reason="no v1 before verl 0.9").PPOTrainerSync
    else:
        kind = RayPPOTrainer
    balance.install()
    one = kind.__new__(kind)
    actor = {"ppo_mini_batch_size": mini_batch, "shuffle": shuffle}
    rollout = {"n": n, "custom": {"dta": options} if options else None}
    one.config = OmegaConf.create(
        {"actor_rollout_ref": {"actor": actor, "rollout": rollout}, "trainer": {"critic_warmup": 0}}
    )
    one.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [rank for rank in range(ranks) for _ in range(2)]})
    one.tokenizer = SimpleNamespace(eos_token_id=EOS)
    one.use_critic, one.global_steps = False, 1
    return one


def shares_of(rows: Sequence[Any], ranks: int, steps: int) -> list[list[list[Any]]]:
    """[step][rank] rows, as verl's dispatch and `train_mini_batch` cut a batch."""
    size = len(rows) // (ranks * steps)
    return [[list(rows[(rank * steps + step) * size :][:size]) for rank in range(ranks)] for step in range(steps)]
