"""A micro-batch of verl, a TensorDict of jagged nested tensors, as a diffusion LM and its update read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tensordict import NonTensorData, TensorDict

from dta_plugin.adapters.verl_plugin.jagged import token_rows
from dta_plugin.errors import UnsupportedError
from dta_plugin.training.diffusion.batch import CANVAS_IDS, COMMIT_STEPS, DiffusionBatch, Rollout, content_seed

# Field of verl's data: [S, samples], what an objective has `stored` of the policy that generated.
TERMS = "dta_elbo_terms"


def diffusion_batch(data: TensorDict, pad: int, step: int, with_rollout: bool = False) -> DiffusionBatch:
    """Its rows, with seeds from their tokens and `step` (`content_seed`): verl's data has no place for drawn ones.

    with_rollout: with what the sampler recorded. Raises UnsupportedError for the trainer of verl 0.8, and for rows
    whose record is not there.
    """
    prompts: Any = data["prompts"]
    if not prompts.is_nested:
        raise UnsupportedError(
            "Diffusion LMs need verl's trainer of trainer.use_v1=True (verl 0.9), whose data path carries ELBO "
            "terms. Got the padded prompts of the older one; set trainer.use_v1=True."
        )
    sequences, begins = token_rows(data), prompts.offsets().diff().tolist()
    seeds = [content_seed(row, begin, step) for row, begin in zip(sequences, begins, strict=True)]
    rollout = _rollout(data) if with_rollout else None
    return DiffusionBatch.from_sequences(sequences, begins, seeds, pad, data["input_ids"].device, rollout)


def without_padding(batch: DiffusionBatch, data: TensorDict) -> DiffusionBatch:
    """The same rows, completions of length 0 in those that fill up verl's last mini-batch: they count for nothing."""
    counts = torch.stack([mask.any() for mask in data["response_mask"].unbind()])
    mask = batch.attention_mask.clone()
    mask[:, -batch.width :] *= counts[:, None]
    return replace(batch, attention_mask=mask)


def _rollout(data: TensorDict) -> Rollout:
    """From what verl carries of each row's TokenOutput, checked against the row's response."""
    extras = list(data["extra_fields"]) if "extra_fields" in data.keys() else [None] * len(data)  # noqa: SIM118
    canvases, steps = [], []
    for extra, response in zip(extras, data["responses"].unbind(), strict=True):
        given: Any = extra.data if isinstance(extra, NonTensorData) else extra
        record = given if isinstance(given, Mapping) else {}
        canvas = list(record.get(CANVAS_IDS, []))
        if COMMIT_STEPS not in record or canvas[: len(response)] != response.tolist():
            raise UnsupportedError(
                f"A response of {len(response)} tokens comes without the steps in which it was written, or with those "
                "of another one. Expected the sampler's record beside it, for objective=trajectory: set "
                "actor_rollout_ref.rollout.name=hf_cpu and use the single_turn_agent of verl; or objective=bgpo, "
                "which needs none."
            )
        canvases.append(canvas)
        steps.append(list(record[COMMIT_STEPS]))
    device = data["input_ids"].device
    return Rollout(torch.tensor(canvases, device=device), torch.tensor(steps, device=device))


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
