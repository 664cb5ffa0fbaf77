"""How far a batch's log-probs and gradients are apart, tree against dense, and what rounding explains of it.

What rounding explains is measured on the same batch (rounding_noise.py). Both passes run in evaluation mode, so that
dropout cannot differ.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from dta_plugin.config import TreeConfig
from dta_plugin.execution.auto import run_dense, run_tree
from dta_plugin.execution.dense import dense_logprobs
from dta_plugin.execution.prepared_batch import PreparedBatch, SequenceLogProbs
from dta_plugin.execution.probing.rounding_noise import (
    Gap,
    is_routed,
    logprob_floor,
    noise_seeds,
    perturbed_embeddings,
    rounding_unit,
)
from dta_plugin.execution.ranks import gathered, is_collective, is_fsdp, is_zero3
from dta_plugin.models.introspection import causal_lm, evaluation_mode
from dta_plugin.models.recurrent_layers import mixers
from dta_plugin.models.vision.dense import dense_inputs

# Times the noise, and rounding steps beyond it, that a parameter's gradient may be off.
_GRADIENT, _STEPS = 4.0, 8
# Delta rules and scans sum logarithms of decays along fixed chunks of a row. Embeddings that move a little do not draw
# the rounding of large sums anew; other chunks do, those of rows behind so much padding, by look.
_PADDING = (37, 23, 48, 11)
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """Tree against dense, and what rounding explains of it.

    Attributes:
        logprobs: their differences, in nats.
        logprob_noise: of them, what rounding explains, in nats.
        gradients: parameter name -> relative error (L2); empty where gradients were not compared.
        gradient_noise: parameter name -> what rounding explains of it.
        unit: relative size of a rounding step.
        logprob_floor: what log-probs may differ anyway, in nats.
    """

    logprobs: Gap
    logprob_noise: Gap
    gradients: dict[str, float]
    gradient_noise: dict[str, float]
    unit: float
    logprob_floor: float

    def __str__(self) -> str:
        text = f"log-probs agree to {self.logprobs.mean:.1e} nats on average, {self.logprobs.most:.1e} at most"
        return text + (f", gradients to {self.worst_gradient[1]:.1e}" if self.gradients else "")

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter that differs most, and by how much."""
        return max(self.gradients.items(), key=lambda item: item[1], default=("none", 0.0))

    def allowed_gradient(self, name: str) -> float:
        """The largest relative error of a parameter's gradient that rounding explains."""
        return _GRADIENT * self.gradient_noise[name] + _STEPS * self.unit

    @property
    def agreeing_logprobs(self) -> bool:
        return self.logprobs.is_within(self.logprob_noise, self.logprob_floor)

    @property
    def wrong_gradients(self) -> list[str]:
        """Names of parameters whose gradients differ by more than rounding."""
        return [name for name, error in self.gradients.items() if not error <= self.allowed_gradient(name)]


def tree_difference(
    model: nn.Module, batch: PreparedBatch, config: TreeConfig, temperature: float
) -> tuple[Difference, str]:
    """Run a batch both ways; and the executor that ran the tree. Leaves the parameters' `.grad` as it was."""
    base = causal_lm(model)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if _has_no_gradients(model, base) or not batch.sequences:
        parameters = {}
    scored = batch.edges.host.scored_tokens
    scored = min(gathered(model, scored)) if is_collective(model) else scored  # ranks look equally often
    routed, noises, gradient_noises = is_routed(base), [], []
    with evaluation_mode(base), torch.set_grad_enabled(bool(parameters)):
        is_recurrent = any(True for _ in mixers(base))
        own, expected = _own(model, batch, temperature, parameters)
        smallest = min((p.numel() for p in parameters.values()), default=scored)
        for seed in noise_seeds(base, scored, smallest):
            with perturbed_embeddings(base, seed):
                padding = _PADDING[seed] if is_recurrent else 0
                moved, gradients = _own(model, batch, temperature, parameters, padding)
            noises.append(Gap.from_differences(moved - own, routed))
            gradient_noises.append(_errors(gradients, expected))
        result = run_tree(model, batch, config, temperature=temperature)
        logprobs = _flat(result)
        gradients = _gradients(logprobs, _weights(batch), parameters) if parameters else {}
    return Difference(
        logprobs=Gap.from_differences(logprobs - own, routed),
        logprob_noise=Gap.largest(noises),
        gradients=_errors(gradients, expected),
        gradient_noise=_by_kind(gradient_noises),
        unit=rounding_unit(base),
        logprob_floor=logprob_floor(own, rounding_unit(base)),
    ), result.report.executor


def _has_no_gradients(model: nn.Module, base: PreTrainedModel) -> bool:
    """Whether gradients cannot be asked for by parameter: they are sharded, or the model's own path has none."""
    is_forward_only = base.device.type == "cpu" and base.config._attn_implementation == "flex_attention"
    return is_forward_only or is_fsdp(model) or is_zero3(model) or torch.is_inference_mode_enabled()


def _flat(result: SequenceLogProbs) -> torch.Tensor:
    return torch.cat([result.anchor[None], *result.logprobs])[1:]  # a rank may have no sequences


def _weights(batch: PreparedBatch) -> torch.Tensor:
    """The linear functional's, of every token's log-prob, float32 [N - S]."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(sum(batch.edges.lengths), generator=generator, dtype=torch.float32, device="cpu")


def _own(
    model: nn.Module, batch: PreparedBatch, temperature: float, parameters: dict[str, nn.Parameter], padding: int = 0
) -> tuple[torch.Tensor, Gradients]:
    """Log-probs, flat, of the model's own path, and gradients: row by row, so that one row's graph is alive.

    padding: so many masked tokens in front of each row, where there are gradients.
    """
    if not parameters:
        return _flat(run_dense(model, batch, temperature=temperature)), {}
    device, lengths = batch.edges.target.device, batch.edges.lengths
    logprobs: list[torch.Tensor] = []
    total: Gradients = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    weights_of = _weights(batch).split(lengths)
    sequences = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for sequence in batch.sequences]
    images = dense_inputs(causal_lm(model), sequences, [images for _, images in batch.rows()], padding)
    rows = zip(sequences, images, batch.temperatures_or(temperature), batch.unscored(), weights_of, strict=True)
    for row, more, own, is_unscored, weights in rows:
        found, _ = dense_logprobs(model, [row], own, padding=padding, images=[more])
        values = found[0].masked_fill(is_unscored, 0.0)
        logprobs.append(values.detach())
        if len(values):
            for name, gradient in _gradients(values, weights, parameters).items():
                total[name] += gradient
    return torch.cat(logprobs), total


def _gradients(values: torch.Tensor, weights: torch.Tensor, parameters: dict[str, nn.Parameter]) -> Gradients:
    if not values.requires_grad:  # of what is to learn, nothing is on the way to log-probs
        return {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    found = torch.autograd.grad((values * weights.to(values)).sum(), list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}


def _errors(gradients: Gradients, expected: Gradients) -> dict[str, float]:
    """|actual - expected| / |expected| of every parameter.

    A floor under the denominator keeps parameters without a gradient worth the name from dominating.
    """
    norms = {name: gradient.double().norm().item() for name, gradient in expected.items()}
    floor = max(1e-3 * max(norms.values(), default=0.0), torch.finfo(torch.float64).tiny)
    return {
        name: (gradients[name].double() - gradient.double()).norm().item() / max(norms[name], floor)
        for name, gradient in expected.items()
    }


def _by_kind(noises: list[dict[str, float]]) -> dict[str, float]:
    """The largest noise of all parameters of a kind: where rounding reroutes a token, few see it in one run."""
    largest: dict[str, float] = defaultdict(float)
    for name, noise in (pair for found in noises for pair in found.items()):
        largest[_kind(name)] = max(largest[_kind(name)], noise)
    return {name: largest[_kind(name)] for name in noises[0]}


def _kind(name: str) -> str:
    """A parameter's name without the numbers of layers and experts."""
    return re.sub(r"\d+", "", name)
