"""A tiny diffusion LM in verl's engine, its mini-batches, and the gradient of its objective from one graph."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, Qwen3Config
from verl.utils import tensordict_utils as tu

from dta_plugin.adapters.verl_plugin.diffusion.micro_batch import TERMS, diffusion_batch
from dta_plugin.adapters.verl_plugin.diffusion.updates import Settings
from dta_plugin.diffusion import bidirectional, draw_masks
from dta_plugin.diffusion.steps import draw_steps
from dta_plugin.training.diffusion.options import DiffusionOptions
from tests.adapters.verl.support import SHAPES, Setup, build, nested, save_model

MASK, SAMPLES = 1, 4
Gradients = dict[str, torch.Tensor]


def save_diffusion_model(folder: Path) -> Path:
    """The tiny Qwen3 of other tests, told to attend in both directions."""
    causal = save_model(folder / "causal")
    config = bidirectional(Qwen3Config.from_pretrained(causal), mask_token_id=MASK)
    AutoModelForCausalLM.from_pretrained(causal, config=config).save_pretrained(folder)
    (causal / "adapter").rename(folder / "adapter")
    return folder


def settings(rows_per_step: int | None = None, length_norm: str = "none", **options: Any) -> Settings:
    options = {"objective": "bgpo"} | options
    norm = {} if options["objective"] == "gdsd" else {"length_norm": length_norm}
    return Settings(
        options=DiffusionOptions(num_elbo_samples=SAMPLES, **norm, **options),
        max_length=12,
        rows_per_step=rows_per_step,
    )


def engine_of(folder: Path, given: Settings, strategy: str = "fsdp2", **setup: Any) -> Any:
    engine = build(Setup(strategy, **setup), folder, tree=True)
    engine.configure(None, given)
    return engine


def advantages_of(count: int) -> torch.Tensor:
    """Of both signs; every fifth row and the last quarter have none."""
    found = torch.sin(1.7 * torch.arange(count) + 1.0)
    found[::5] = 0.0
    found[count - count // 4 :] = 0.0
    return found


def mini_batch(
    rank: int = 0,
    ranks: int = 1,
    shape: str = "groups",
    budget: int = 90,
    rows: int = 0,
    advantages: torch.Tensor | None = None,
) -> TensorDict:
    """A rank's part. rows: per micro-batch, 0 for a token budget. advantages: of all rows."""
    sequences, begins = SHAPES[shape]()
    total = len(sequences)
    advantages = advantages_of(total) if advantages is None else advantages
    mine = slice(rank * total // ranks, (rank + 1) * total // ranks)
    ids = [torch.tensor(sequence) for sequence in sequences[mine]]
    pairs = list(zip(ids, begins[mine], strict=True))
    masks = [torch.ones(len(row) - begin, dtype=torch.long) for row, begin in pairs]
    tensors = {
        "input_ids": nested(ids),
        "position_ids": nested([torch.arange(len(row)) for row in ids]),
        "prompts": nested([row[:begin] for row, begin in pairs]),
        "responses": nested([row[begin:] for row, begin in pairs]),
        "response_mask": nested(masks),
        "loss_mask": nested(masks),
        "advantages": nested([a.expand(len(m)).clone() for a, m in zip(advantages[mine], masks, strict=True)]),
    }
    data = TensorDict(tensors, batch_size=[len(ids)])
    tu.assign_non_tensor(
        data,
        temperature=0.8,  # of sampling: likelihoods are the model's own
        use_dynamic_bsz=not rows,
        max_token_len_per_gpu=budget,
        micro_batch_size_per_gpu=rows,
        global_batch_size=total,
        calculate_entropy=True,
    )
    return data


def record_steps(data: TensorDict, gen_length: int = 32) -> None:
    """Put the sampler's record into the data, as verl carries it: canvases written two tokens at a time from the end.

    A token behind the response was committed, too.
    """
    extras = []
    for response in data["responses"].unbind():
        canvas = torch.full((gen_length,), MASK)
        canvas[: len(response)] = response
        canvas[len(response) : len(response) + 1] = 9
        steps = (torch.arange(gen_length).flip(0) // 2).masked_fill(canvas == MASK, -1)
        extras.append({"canvas_ids": canvas.tolist(), "commit_steps": steps.tolist(), "global_steps": 1})
    tu.assign_non_tensor_stack(data, "extra_fields", extras)


def step_gradient(folder: Path, data: TensorDict, old: torch.Tensor | None, epsilon: float = 0.2) -> Gradients:
    """Of the trajectory objective, row by row, step by step, in one graph."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    batch = diffusion_batch(data, 0, 0, with_rollout=True)
    assert batch.rollout is not None
    draws = draw_steps(batch.rollout.steps, batch.lengths, SAMPLES, batch.seeds)
    advantages, total = [row[0] for row in data["advantages"].unbind()], torch.zeros(())
    for row, (ids, response) in enumerate(zip(data["input_ids"].unbind(), data["responses"].unbind(), strict=True)):
        canvas, steps = batch.rollout.canvas_ids[row], batch.rollout.steps[row]
        count = len(set(steps[: len(response)].tolist()))
        terms = []
        for sample, step in enumerate(draws.chosen[row].tolist()):
            if step < 0:
                continue
            seen = torch.where((steps >= 0) & (steps < step), canvas, MASK)
            begin = len(ids) - len(response)
            scores = model(torch.cat([ids[:begin], seen])[None]).logits[0, begin:].log_softmax(-1)
            scored = [i for i in range(len(response)) if steps[i] == step]
            new = scores[scored].gather(1, canvas[scored, None]).sum()
            ratio = (new - (new.detach() if old is None else old[row, sample])).exp()
            clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
            terms.append(torch.minimum(ratio * advantages[row], clipped * advantages[row]))
        total = total + count * torch.stack(terms).mean()
    (-total / len(data)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance_gradient(folder: Path, data: TensorDict, old: torch.Tensor | None, epsilon: float = 0.2) -> Gradients:
    """Of GDSD's squared distance, row by row without padding, all samples in one graph; rows of mask 0 have none."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    batch = diffusion_batch(data, 0, 0)
    draws, total = draw_masks(batch.lengths, SAMPLES, batch.seeds), torch.zeros(())
    rows = zip(
        *(data[name].unbind() for name in ("input_ids", "responses", "advantages", "response_mask")), strict=True
    )
    for row, (ids, response, advantages, counts) in enumerate(rows):
        begin = len(ids) - len(response)
        for sample in range(SAMPLES if counts.any() else 0):
            hidden = draws.mask(sample, batch.width)[row, : len(response)]
            noised = torch.cat([ids[:begin], response.masked_fill(hidden, MASK)])
            scores = model(noised[None]).logits[0, begin:].log_softmax(-1)
            new = scores.gather(1, response[:, None])[hidden, 0].sum()
            d = new - (new.detach() if old is None else old[row, sample])
            clamped = d.clamp(math.log(1 - epsilon), math.log(1 + epsilon))
            total = total + (clamped / 12 - advantages[0]) ** 2 / SAMPLES
    (total / len(data)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def carry_terms(engine: Any, data: TensorDict, moved: float = 0.0) -> torch.Tensor:
    """Put the log-prob pass's ELBO terms into the data, moved away by up to so much: [S, samples]."""
    with engine.eval_mode():
        outputs = engine.infer_batch(data.copy(), loss_function=None)["model_output"]
    terms = torch.stack(list(outputs[TERMS].unbind()))
    terms = terms + moved * torch.cos(torch.arange(terms.numel()) * 1.3).view_as(terms)
    data[TERMS] = nested(list(terms))
    return terms


def engine_gradient(engine: Any, data: TensorDict) -> tuple[Gradients, dict[str, Any]]:
    """Of every parameter, whole, after verl's loop over micro-batches; and what verl keeps of it."""
    with engine.train_mode():
        engine.optimizer_zero_grad()
        outputs = engine.forward_backward_batch(data, None, forward_only=False)
        found = {name: _whole(p.grad) for name, p in engine.module.named_parameters() if p.grad is not None}
        engine.optimizer_zero_grad()
    return found, outputs


def graph_gradient(
    folder: Path,
    data: TensorDict,
    old: torch.Tensor | None,
    scale: list[float] | None = None,
    step: int = 0,
    objective: str = "bgpo",
) -> tuple[Gradients, float]:
    """From the paper's formulas, row by row without padding, all samples in one graph; and the loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    batch = diffusion_batch(data, 0, step)
    draws = draw_masks(batch.lengths, SAMPLES, batch.seeds)
    advantages = [row[0] for row in data["advantages"].unbind()]
    bound = torch.zeros(())
    for row, (ids, response) in enumerate(zip(data["input_ids"].unbind(), data["responses"].unbind(), strict=True)):
        begin = len(ids) - len(response)
        differences = []
        for sample in range(SAMPLES):
            hidden = draws.mask(sample, batch.width)[row, : len(response)]
            noised = torch.cat([ids[:begin], response.masked_fill(hidden, MASK)])
            scores = model(noised[None]).logits[0, begin:].log_softmax(-1)
            term = scores.gather(1, response[:, None])[hidden, 0].sum() * len(response) / hidden.sum()
            before = term.detach() if old is None else old[row, sample]
            differences.append((term - before) * (1.0 if scale is None else scale[row]))
        d = torch.stack(differences)
        if objective == "vrpo":
            bound = bound + d.mean().exp() * advantages[row]
        else:
            bound = bound + ((1 + d if advantages[row] >= 0 else d.exp()) * advantages[row]).mean()
    loss = -bound / len(data)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss.item()


def largest_difference(one: Gradients, other: Gradients) -> float:
    """Relative to the largest entry."""
    assert one.keys() == other.keys() and one
    top = max(float(gradient.abs().max()) for gradient in other.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / top


def norm(gradients: Gradients) -> float:
    """Of all of them; FSDP 1 has them flat, and does not tell which is whose."""
    return torch.stack([gradient.float().norm() for gradient in gradients.values()]).norm().item()


def _whole(gradient: Any) -> torch.Tensor:
    found = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found.detach().clone()
