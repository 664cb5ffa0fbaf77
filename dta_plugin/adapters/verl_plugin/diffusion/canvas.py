"""A micro-batch of verl as a diffusion LM reads it: prompts and responses side by side, padded outside; and seeds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from dta_plugin.adapters.verl_plugin.jagged import token_rows
from dta_plugin.errors import UnsupportedError

TERMS = "dta_elbo_terms"  # field of verl's data: [S, samples] ELBO terms of the policy that generated


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """S rows. input_ids, attention_mask: int64 [S, P + C]. lengths: int64 [S] of responses. width: C.

    seeds: int64 [S], from a row's tokens and `step` alone: the same in every pass, micro-batch and rank.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor
    seeds: torch.Tensor
    width: int

    @classmethod
    def of(cls, data: TensorDict, pad: int, step: int) -> Canvas:
        """step: how often the policy's rollouts have been trained on; it makes the noise of a row that comes again new.

        Raises UnsupportedError for the trainer of verl 0.8.
        """
        prompts: Any = data["prompts"]
        if not prompts.is_nested:
            raise UnsupportedError(
                "Diffusion LMs need verl's trainer of trainer.use_v1=True (verl 0.9), whose data path carries ELBO "
                "terms. Got the padded prompts of the older one; set trainer.use_v1=True."
            )
        sequences, begins = token_rows(data), prompts.offsets().diff().tolist()
        places = list(zip(sequences, begins, strict=True))
        longest, width = max(begins), max(len(row) - begin for row, begin in places)
        ids = np.full((len(places), longest + width), pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for line, real, (row, begin) in zip(ids, mask, places, strict=True):
            place = slice(longest - begin, longest - begin + len(row))
            line[place], real[place] = row, 1
        device = data["input_ids"].device

        def tensor(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int64, device=device)

        lengths = tensor([len(row) - begin for row, begin in places])
        seeds = tensor([_seed(row, begin, step) for row, begin in places])
        return cls(tensor(ids), tensor(mask), lengths, seeds, width)


def row_advantages(data: TensorDict) -> torch.Tensor:
    """float32 [S]: the one advantage that all tokens of a response have; 0 for verl's padding rows.

    Raises UnsupportedError for tokens without loss in a response, for advantages that differ among its tokens, and
    for those that are not finite, which log-probs have gone into.
    """
    found = []
    for given, mask in zip(data["advantages"].unbind(), data["response_mask"].unbind(), strict=True):
        values = given.float()
        if not mask.any():  # a row that fills up the last mini-batch
            values = values.new_zeros(1)
        elif not mask.all():
            raise UnsupportedError(
                f"A response of {len(mask)} tokens has {int((mask == 0).sum())} without loss, such as those of tools. "
                "Expected one completion of the model per row; use the single_turn_agent of verl."
            )
        if not values.isfinite().all():
            raise UnsupportedError(
                "Advantages are not finite: a diffusion LM has no log-probs of tokens, and verl gets NaN for them. "
                "Expected advantages of rewards alone; set algorithm.use_kl_in_reward=False and adv_estimator=grpo."
            )
        if (values != values[0]).any():
            raise UnsupportedError(
                f"Advantages from {float(values.min())} to {float(values.max())} in one response. Expected one per "
                "response: its likelihood is that of all tokens; set algorithm.adv_estimator=grpo."
            )
        found.append(values[0])
    return torch.stack(found)


def carried_terms(data: TensorDict) -> torch.Tensor | None:
    """[S, samples] that the log-prob pass has left in the data, or None."""
    if TERMS not in data.keys():  # noqa: SIM118 (a TensorDict)
        return None
    return torch.stack(list(data[TERMS].unbind()))


def _seed(tokens: np.ndarray, begin: int, step: int) -> int:
    content = np.concatenate([np.array([step, begin]), tokens]).astype("<i8")
    return int.from_bytes(hashlib.blake2b(content.tobytes(), digest_size=7).digest(), "little")
