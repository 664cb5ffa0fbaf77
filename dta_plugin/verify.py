"""Compare the tree with the dense path on a user's own model and batch: log-probs, and gradients of every parameter.

What training uses is what is compared, packed or streamed as it runs, within what rounding explains of the same batch
(execution/probing/tree_difference.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from dta_plugin.config import TreeConfig
from dta_plugin.errors import VerificationError
from dta_plugin.execution.auto import run_dense
from dta_plugin.execution.prepared_batch import PreparedBatch, prepare_batch
from dta_plugin.execution.probing.traces import decoder_layers, first_difference, traced
from dta_plugin.execution.probing.tree_difference import Difference, tree_difference
from dta_plugin.execution.ranks import is_collective, without_reducers
from dta_plugin.models.introspection import causal_lm, evaluation_mode
from dta_plugin.models.vision.units import ImageInputs
from dta_plugin.option_places import Place, Scope
from dta_plugin.tree.layout import Scored
from dta_plugin.tree.trie import TokenSequence

_COMPARISON = Place(
    "in a comparison", {Scope.CALL, Scope.BATCH}, "the sequences run as they are given, once, without a trainer"
)


def check_batch(model: nn.Module, batch: PreparedBatch, config: TreeConfig, temperature: float = 1.0) -> Difference:
    """Run a prepared batch both ways: log-probs, and gradients where the weights are not sharded over ranks.

    Args:
        model: a Hugging Face causal LM, possibly wrapped; its parameters' `.grad` stays as it was.
        batch: what `prepare_batch` made for this model.
        config: the executor and backend of the tree.
        temperature: logits are divided by it; a batch with temperatures of its own goes by those.

    Returns:
        How far tree and dense are apart, log-probs in nats and gradients relative to their norm, and what rounding
        explains of it.

    Raises:
        VerificationError: they differ by more than that: from which layer on, in which parameter.
        InvalidInputError: as `sequence_logprobs`.
        UnsupportedError: as `sequence_logprobs`.
    """
    model = without_reducers(model)
    difference, executor = tree_difference(model, batch, config, temperature)
    if not difference.agreeing_logprobs:
        what = f"log-probs differ {_place(model, batch, config, executor)}, by {_in_words(difference)}"
    elif difference.wrong_gradients:
        what = f"gradients differ {_parameters(model, difference)}"
    else:
        return difference
    raise VerificationError(
        f"Tree and dense {what}. Please report the model ({type(causal_lm(model)).__name__}) with the output of "
        "`dta doctor`; until then run without the tree."
    )


def compare(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    scored: Scored | None = None,
    config: TreeConfig | None = None,
    temperature: float = 1.0,
    images: Sequence[ImageInputs | None] | None = None,
) -> Difference:
    """Log-probs and gradients of a seeded random linear functional of them, tree against dense, without a probe.

    Args:
        model: a Hugging Face causal LM, possibly wrapped; its parameters' `.grad` stays as it was.
        sequences: lists of ints or 1-D int tensors, unpadded.
        scored: as for `sequence_logprobs`.
        config: the executor and backend of the tree; None for the defaults.
        temperature: logits are divided by it, above 0.
        images: as for `sequence_logprobs`.

    Returns:
        How far both are apart, and what rounding explains of it.

    Raises:
        InvalidInputError: as `sequence_logprobs`.
        UnsupportedError: as `sequence_logprobs`.
    """
    _COMPARISON.check(config or TreeConfig())
    config = replace(config or TreeConfig(), probe="off")
    batch = prepare_batch(model, sequences, scored, config, images=images)
    return tree_difference(model, batch, config, temperature)[0]


def _place(model: nn.Module, batch: PreparedBatch, config: TreeConfig, executor: str) -> str:
    """Where the hidden states of a batch part."""
    base = causal_lm(model)
    if is_collective(model):  # all ranks must call the model equally often
        return "somewhere"
    budget = max(1, batch.tree.tree_tokens // 4) if executor == "streamed" else None
    with evaluation_mode(base), torch.no_grad():
        layer = first_difference(
            base,
            batch.tree.paths,
            lambda: run_dense(model, batch),
            lambda: traced(model, batch.tree, batch.edges, budget, config.backend, batch.images)[1],
        )
    return "somewhere" if layer is None else f"from layer {layer} on"


def _in_words(difference: Difference) -> str:
    gap, noise = difference.logprobs, difference.logprob_noise
    return (
        f"{gap.mean:.2e} nats on average and {gap.most:.2e} at most, where rounding explains {noise.mean:.1e} and "
        f"{noise.most:.1e}"
    )


def _parameters(model: nn.Module, difference: Difference) -> str:
    """The layer nearest to the head with a wrong gradient, which is where a backward pass goes wrong first."""
    wrong = difference.wrong_gradients
    layers = decoder_layers(causal_lm(model))
    layer_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
    places = [layer_of[id(p)] for name, p in model.named_parameters() if name in set(wrong) and id(p) in layer_of]
    worst = max(wrong, key=lambda name: difference.gradients[name])
    where = f"from layer {max(places)} down" if places else f"in {len(wrong)} parameters"
    return (
        f"{where}, most in {worst}: by {difference.gradients[worst]:.1e} of its norm, where rounding explains "
        f"{difference.gradient_noise[worst]:.1e}"
    )
