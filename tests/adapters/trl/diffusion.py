"""Tiny diffusion trainers, and the loss of a micro-step computed anew: plain logits, formulas as written, one graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from dta_plugin.adapters.trl import DiffusionGRPOConfig, DiffusionGRPOTrainer
from dta_plugin.diffusion import draw_masks, prompt_noise
from tests.adapters.trl.support import TRAINING, VOCABULARY, build, tokenizer
from tests.support.tiny_diffusion import diffusion_model

MASK = VOCABULARY - 1
Gradients = dict[str, torch.Tensor]
# Four completions of each of two prompts per step, SGD steps large enough that later passes are off-policy.
TINY: dict[str, Any] = TRAINING | {
    "objective": "bgpo",
    "mask_token_id": MASK,
    "is_shifted": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 8,
    "num_elbo_samples": 4,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


def model(dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    return diffusion_model(dtype=dtype, vocab_size=VOCABULARY, **changes)


def trainer(
    output: Path,
    policy: str | torch.nn.Module | None = None,
    trainer_class: type = DiffusionGRPOTrainer,
    trainer_options: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A trainer of a tiny model (or of `policy`) with the options of TINY and these."""
    policy = model() if policy is None else policy
    options = {"processing_class": tokenizer()} | (trainer_options or {})
    start = policy if isinstance(policy, str) else lambda: policy
    return build(start, output, trainer_class, DiffusionGRPOConfig, options, **TINY | config)


@dataclass
class Step:
    """One optimizer step: weights before it, its micro-batches as the loss gets them, gradients, and reported loss."""

    before: Gradients
    micro_batches: list[dict[str, Any]] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    reported: float = 0.0
    gradients: Gradients = field(default_factory=dict)


class Recorder(TrainerCallback):
    """Writes down every optimizer step of a trainer, and the weights at each generation."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.steps: list[Step] = []
        self.generators: list[Gradients] = []  # per generation, the weights that generated
        self.generator_of: list[int] = []  # per optimizer step, which generation it reads
        self._loss, self._generate = trainer._compute_loss, trainer._generate_and_score_completions
        trainer._compute_loss = self.compute_loss
        trainer._generate_and_score_completions = self.generate
        trainer.add_callback(self)

    def generate(self, inputs: Any) -> Any:
        self.generators.append(self.weights())
        return self._generate(inputs)

    def compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        step = self.steps[-1]
        step.micro_batches.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        own = self.trainer
        step.iterations.append(own._step // own.args.steps_per_generation % own.num_iterations)
        loss = self._loss(model, inputs)
        step.reported += float(loss.detach())
        return loss

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(Step(self.weights()))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        named = self.trainer.model.named_parameters()
        self.steps[-1].gradients = {n: whole(p.grad).clone() for n, p in named if p.grad is not None}
        self.generator_of.append(len(self.generators) - 1)

    def weights(self) -> Gradients:
        return {n: whole(p.detach()).clone() for n, p in self.trainer.model.named_parameters()}


@dataclass
class Outcome:
    """Of a run: per optimizer step the gradients, after the last one the weights, and the log."""

    gradients: list[Gradients]
    weights: Gradients
    logs: list[dict[str, float]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def recorded(trainer: Any) -> Recorder:
    """Train, and return what happened."""
    recorder = Recorder(trainer)
    trainer.train()
    return recorder


@dataclass
class Check:
    """Computes the gradient of recorded steps anew. blank: a model of the same shape, plain, with the first weights."""

    config: DiffusionGRPOConfig
    blank: torch.nn.Module
    seed_shift: int = 0  # negative control: other masks

    def __post_init__(self) -> None:
        self.first = {n: p.detach().clone() for n, p in self.blank.named_parameters()}

    def gradients(self, recorder: Recorder, number: int) -> tuple[float, Gradients]:
        """-> loss and gradients of an optimizer step: the mean over its micro-batches, in one graph."""
        step = recorder.steps[number]
        policy = self._with(step.before)
        old = self._with(recorder.generators[recorder.generator_of[number]])
        reference = self._with(self.first)
        losses = [
            self.loss(policy, old, reference, batch, iteration)
            for batch, iteration in zip(step.micro_batches, step.iterations, strict=True)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        return float(loss.detach()), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    def _with(self, weights: Gradients) -> torch.nn.Module:
        own = copy.deepcopy(self.blank)
        own.load_state_dict(weights, strict=False)
        return own

    def loss(
        self,
        policy: torch.nn.Module,
        old: torch.nn.Module,
        reference: torch.nn.Module,
        inputs: dict[str, Any],
        iteration: int,
    ) -> torch.Tensor:
        config = self.config
        ways = {"diffu-grpo": self._tokens, "trajectory": self._steps}
        values: Callable[..., torch.Tensor] = ways.get(config.objective, self._elbos)
        new = values(policy, inputs, iteration)
        with torch.no_grad():
            before, fixed = values(old, inputs, iteration), values(reference, inputs, iteration)
        advantages = inputs["advantages"].to(new.dtype)[:, None]
        scored = inputs["completion_mask"].bool()
        lengths = scored.sum(1)
        if config.objective == "diffu-grpo":
            ratio = ((new - before) * scored).exp()
            clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
            tokens = torch.minimum(ratio * advantages, clipped * advantages)
            apart = (fixed - new) * scored
            tokens = tokens - config.beta * (apart.exp() - 1 - apart)
            return -((tokens * scored).sum(1) / lengths.clamp(min=1)).mean()
        divisor = {"none": torch.ones_like(lengths), "length": lengths.clamp(min=1)}.get(
            config.length_norm, torch.full_like(lengths, config.max_completion_length)
        )
        if config.objective == "trajectory":
            return self._trajectory_loss(new, before, fixed, advantages, inputs, divisor)
        is_empty = lengths == 0
        if config.objective == "gdsd":
            low, high = math.log(1 - config.epsilon), math.log(1 + config.epsilon)
            canvas = config.max_completion_length
            distance = (new - before).clamp(low, high) / canvas - config.advantage_scale * advantages
            terms = distance**2 + config.beta * ((new - fixed) / canvas) ** 2 / 2
            return terms.masked_fill(is_empty[:, None], 0.0).mean()
        d, kl = (new - before) / divisor[:, None], (new - fixed) / divisor[:, None]
        if config.objective == "vrpo":
            rows = d.mean(1).exp() * advantages[:, 0] - config.beta * kl.mean(1).square() / 2
            return -rows.masked_fill(is_empty, 0.0).mean()
        ratio = torch.where(advantages >= 0, 1 + d, d.exp())
        terms = ratio * advantages
        if config.bound_clip is not None:
            low, high = 1 - config.bound_clip, 1 + config.bound_clip
            terms = torch.minimum(terms, ratio.clamp(low, high) * advantages)
        if config.dual_clip is not None:
            terms = torch.where(advantages < 0, torch.maximum(terms, config.dual_clip * advantages), terms)
        return -(terms.masked_fill(is_empty[:, None], 0.0) - config.beta * kl.square() / 2).mean()

    def _trajectory_loss(
        self,
        new: torch.Tensor,
        before: torch.Tensor,
        fixed: torch.Tensor,
        advantages: torch.Tensor,
        inputs: dict[str, Any],
        divisor: torch.Tensor,
    ) -> torch.Tensor:
        """Of the log-probs [B, n] of drawn steps, 0 where a row has fewer."""
        config, lengths = self.config, inputs["completion_mask"].sum(1)
        ratio = (new - before).exp()
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
        terms = torch.minimum(ratio * advantages, clipped * advantages)
        terms = terms - config.beta * ((fixed - new).exp() - 1 - (fixed - new))
        total = new.new_zeros(())
        for row, length in enumerate(lengths.tolist()):
            if length:
                count = len(set(inputs["commit_steps"][row, :length].tolist()))
                kept = terms[row, : min(count, config.num_elbo_samples)]
                total = total + count * kept.mean() / divisor[row]  # the mean over drawn steps stands for that over all
        return -total / len(lengths)

    def _steps(self, model: torch.nn.Module, inputs: dict[str, Any], _: int) -> torch.Tensor:
        """Log-probs [B, n] of each row's drawn steps, a forward for every row and step."""
        config, lengths = self.config, inputs["completion_mask"].sum(1).tolist()
        found = []
        for row, length in enumerate(lengths):
            steps, canvas = inputs["commit_steps"][row], inputs["canvas_ids"][row]
            seed = int(inputs["mask_seeds"][row]) + self.seed_shift
            order = np.random.default_rng(seed).permutation(sorted(set(steps[:length].tolist())))
            own = []
            for step in order[: config.num_elbo_samples].tolist():
                seen = torch.where((steps >= 0) & (steps < step), canvas, MASK)
                ids = torch.cat([inputs["prompt_ids"][row], seen])[None]
                attention = torch.cat([inputs["prompt_mask"][row], torch.ones_like(seen)])[None]
                logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[0, -len(seen) :]
                scored = (steps == step).nonzero()[:, 0]
                scored = scored[scored < length]
                own.append(logits[scored].log_softmax(-1).gather(1, canvas[scored, None]).sum())
            own += [torch.zeros((), dtype=model.dtype)] * (config.num_elbo_samples - len(own))
            found.append(torch.stack(own))
        return torch.stack(found)

    def _elbos(self, model: torch.nn.Module, inputs: dict[str, Any], _: int) -> torch.Tensor:
        """ELBO terms [B, n]; of gdsd without their weights."""
        config, lengths = self.config, inputs["completion_mask"].sum(1)
        seeds = inputs["mask_seeds"] + self.seed_shift
        draws = draw_masks(
            lengths,
            config.num_elbo_samples,
            seeds,
            config.mask_form,
            config.stratified_masks,
            config.coupled_masks,
        )
        terms = []
        for sample in range(draws.samples):
            mask = draws.mask(sample, inputs["completion_ids"].shape[1])
            scores = self._scores(model, inputs, inputs["prompt_ids"], mask)
            weight = 1.0 if config.objective == "gdsd" else draws.weights[:, sample]
            terms.append((scores * mask).sum(1) * weight)
        return torch.stack(terms, 1)

    def _tokens(self, model: torch.nn.Module, inputs: dict[str, Any], iteration: int) -> torch.Tensor:
        """Log-probs [B, C], every completion token hidden."""
        seeds = inputs["mask_seeds"] + self.seed_shift
        hidden = prompt_noise(inputs["prompt_mask"], seeds, self.config.prompt_mask_probability, iteration)
        prompt = inputs["prompt_ids"].masked_fill(hidden, MASK)
        return self._scores(model, inputs, prompt, inputs["completion_mask"].bool())

    def _scores(
        self, model: torch.nn.Module, inputs: dict[str, Any], prompt: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        completion = inputs["completion_ids"]
        noised = torch.cat([prompt, completion.masked_fill(mask, MASK)], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = model(input_ids=noised, attention_mask=attention, use_cache=False).logits[:, prompt.shape[1] :]
        return logits.log_softmax(-1).gather(2, completion[..., None])[..., 0]


def largest_difference(one: Gradients, other: Gradients) -> float:
    """Of two sets of gradients, relative to the largest entry."""
    assert one.keys() == other.keys() and one
    top = max(float(g.abs().max()) for g in one.values())
    assert top > 1e-4, "the gradients say nothing"
    return max(float((one[n] - other[n]).abs().max()) for n in one) / top


def one_word_dataset(rows: int = 32) -> Dataset:
    return Dataset.from_list([{"prompt": f"w{5 + i % 4} w6 w8"} for i in range(rows)])
