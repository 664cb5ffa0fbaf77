"""Recorded rollouts, a worker that hands them out, and what a loop without TRL makes of them, one sample at a time."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from tests.adapters.trl.support import TRAINING, VOCABULARY, prompts, tokenizer
from tests.support.models import EAGER_EXPERTS, random_model

BATCH = 8
TEMPERATURE = 0.7
EPSILON = 0.2
CONFIG: dict[str, Any] = {
    **{name: value for name, value in TRAINING.items() if name != "num_generations"},
    "per_device_train_batch_size": BATCH,
    "token_budget": 0,  # as many samples as the batch has
    "max_staleness": 100,
    "temperature": TEMPERATURE,
    "epsilon": EPSILON,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
}


def samples(batches: int, seed: int = 0) -> list[RolloutSample]:
    """Per batch of 8, two groups: siblings that fork in two places, a prefix of another, two that are the same.

    A conversation has several turns, and what a tool says in between is not trained.
    """
    generator = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return generator.integers(3, VOCABULARY, count).tolist()

    found = []
    for batch in range(batches):
        system = words(6)
        for group in range(2):
            prompt, turn, tool = system + words(5), words(6), words(4)
            first = [*turn, *tool, *words(5)]
            completions = [first, [*turn, *tool, *words(7)], first[:12], words(8)]
            if group == 0:
                completions[3] = first
            for completion in completions:
                ids = np.array(prompt + completion)
                trained = np.arange(len(ids)) >= len(prompt)
                if completion[:6] == turn:
                    trained[len(prompt) + 6 : len(prompt) + 10] = False
                found.append(
                    RolloutSample(
                        prompt=[],
                        completion=[],
                        input_ids=ids,
                        completion_mask=trained.astype(np.int64),
                        old_log_probs=np.where(trained, generator.normal(-3.5, 0.7, len(ids)), 0.0).astype(np.float32),
                        advantage=float(generator.normal()),
                        model_version=0,
                        group_id=2 * batch + group,
                        metrics={"reward": float(generator.random())},
                    )
                )
    return found


class Worker:
    """The worker's side of TRL's protocol, in this process; it has all of its samples from the beginning."""

    def __init__(self, rollouts: Iterable[RolloutSample]) -> None:
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue()
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue()
        for sample in rollouts:
            self.rollout_buffer.put(sample)

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None:
        raise AssertionError("the trainer wants more samples than there are")


class Transfer:
    """Weights go nowhere; what is listed is counted."""

    def __init__(self) -> None:
        self.sent: list[set[str]] = []

    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.sent.append({name for name, _ in iterator})

    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def save(config: PretrainedConfig, folder: Path) -> str:
    """A model on disk, every parameter random, with its tokenizer."""
    tokenizer().save_pretrained(folder)
    random_model(config).save_pretrained(folder)
    return str(folder)


def build(
    model: str, output: Path, rollouts: list[RolloutSample], trainer_class: Any, config_class: Any, **config: Any
) -> Any:
    """A real trainer with a worker that has recorded rollouts."""
    options = {name: config.pop(name) for name in ("peft_config",) if name in config}
    args = config_class(output_dir=str(output), **(CONFIG | config))
    set_seed(11)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=prompts(),
        rollout_worker=Worker(rollouts),
        weight_transfer=Transfer(),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    """What the trainer's planner and collator make of its first samples."""
    return next(iter(trainer.get_train_dataloader()))


def dense_model(model: str) -> PreTrainedModel:
    """Transformers' own, with eager attention, which knows windows, soft-caps and sinks."""
    return AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", **EAGER_EXPERTS)


def dense_loss(model: nn.Module, rollouts: Iterable[RolloutSample]) -> torch.Tensor:
    """Clipped policy loss of one micro-batch, a mean over trained tokens, one sample after the other."""
    total, tokens = 0.0, 0
    for sample in rollouts:
        ids = torch.from_numpy(sample.input_ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1] / TEMPERATURE
        logprobs = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        trained = torch.from_numpy(sample.completion_mask[1:]).bool()
        ratio = (logprobs - torch.from_numpy(sample.old_log_probs[1:])).exp()[trained]
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        total = total - torch.min(ratio * sample.advantage, clipped * sample.advantage).sum()
        tokens += int(trained.sum())
    assert isinstance(total, torch.Tensor)
    return total / tokens


def dense_training(
    model: nn.Module, rollouts: list[RolloutSample], steps: int, accumulated: int = 1, batch: int = BATCH
) -> list[float]:
    """What the trainer does, without it: AdamW, clipped gradients. Returns the losses of the steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG["learning_rate"], eps=CONFIG["adam_epsilon"], weight_decay=0.0)
    micro_batches = (rollouts[start : start + batch] for start in range(0, len(rollouts), batch))
    losses = []
    for _ in range(steps):
        loss = sum(dense_loss(model, next(micro_batches)) / accumulated for _ in range(accumulated))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_kernel() -> SimpleNamespace:
    """FlashAttention-3's function for rows of segments, in torch: TRL's own path on a CPU."""

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        starts_q: torch.Tensor,
        starts_k: torch.Tensor,
        longest_q: int,
        longest_k: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float = 0.0,
    ) -> torch.Tensor:
        outputs = []
        repeats = q.shape[1] // k.shape[1]
        for segment in range(len(starts_q) - 1):
            queries = q[starts_q[segment] : starts_q[segment + 1]]
            keys, values = (x[starts_k[segment] : starts_k[segment + 1]].repeat_interleave(repeats, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            at = torch.arange(len(keys))[-len(queries) :, None]
            behind = at - torch.arange(len(keys))
            hidden = (behind < 0) | ((behind > window_size[0]) if window_size[0] >= 0 else False)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
        return torch.cat(outputs)

    return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
