"""The functions behind `import dta_plugin`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dta_plugin.config import TreeConfig
from dta_plugin.decline import decline
from dta_plugin.errors import InvalidInputError, UnsupportedError
from dta_plugin.execution.auto import run_dense, run_tree
from dta_plugin.execution.prepared_batch import SequenceLogProbs, prepare_batch
from dta_plugin.models.dispatch import install
from dta_plugin.models.introspection import causal_lm
from dta_plugin.models.vision.units import ImageInputs
from dta_plugin.option_places import Place, Scope
from dta_plugin.tree.layout import Scored
from dta_plugin.tree.trie import TokenSequence
from dta_plugin.verify import check_batch

PLACE = Place(
    "in sequence_logprobs",
    {Scope.CALL, Scope.BATCH},
    "the sequences run as they are given, and the loss is the caller's",
    {
        "calibration": "there is no dense path of a trainer whose time could be predicted; min_saving goes by FLOPs",
        "token_selection": "there is no loss to weigh (draw tokens with dta_plugin.token_selection.select.draw, pass "
        "them as scored=, and weigh their terms by Drawn.weights)",
        "picture": "a trainer has a first step (dta_plugin.tree.picture.draw_svg(result.report.tree) draws any call)",
    },
)
# 0-based number of each model's last call with `verify` on.
_call_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def sequence_logprobs(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    config: TreeConfig | None = None,
    temperature: float | Sequence[float] = 1.0,
    return_entropy: bool = False,
    scored: Scored | None = None,
    images: Sequence[ImageInputs | None] | None = None,
) -> SequenceLogProbs:
    """Log-probs of every token of every sequence, shared prefixes computed once, forward and backward.

    A DDP or FSDP2 rank that has no sequences calls this all the same, and takes ``anchor`` as its loss. Trees larger
    than memory run chunk by chunk, in the manner of AReaL-DTA (arXiv 2602.00482).

    Args:
        model: a Hugging Face causal LM, possibly inside PEFT, DDP or FSDP2; training mode and gradients as usual.
        sequences: lists of ints or 1-D int tensors, unpadded; prompt and completion in one row.
        config: how the tree runs; None for the defaults.
        temperature: logits are divided by it, above 0; a list of one per sequence where they differ.
        return_entropy: also the entropy of each next-token distribution.
        scored: per sequence a bool mask [len] over its tokens, or an int b >= 1 meaning "tokens b.. are scored". The LM
            head runs only there and the other entries are exactly 0. None: all tokens but the first.
        images: per sequence, what the model's own processor returned for its images, in order and beside ids and masks
            (``pixel_values``, ``image_grid_thw``, ``image_sizes``, ...), or None for text; the sequence has the
            placeholders. Every distinct image goes through the vision tower once. None: text alone.

    Returns:
        ``logprobs[s][i] = log p(seq[i + 1] | seq[:i + 1])`` in nats, [len - 1] per sequence, float32 (float64 for
        float64 models), differentiable; ``entropies`` alike, in nats, or None. ``report`` says what was shared and
        which path ran; ``anchor`` is 0, differentiable in all parameters.

    Raises:
        InvalidInputError: an empty batch or sequence, a mask of the wrong length, a temperature that is not finite
            and above 0, NaN in the model's output, an executor that cannot do what is asked for, an option
            that does nothing here.
        UnsupportedError: the tree would not be exact. With ``config.on_unsupported == "dense"`` the dense path runs.
        VerificationError: with ``config.verify``, the tree differs from the dense path by more than rounding.
    """
    common, own = _temperatures(temperature)
    config = config or TreeConfig()
    PLACE.check(config)
    batch = prepare_batch(model, sequences, scored, config, temperatures=own, images=images)
    if not batch.decision.use_tree:
        return run_dense(model, batch, temperature=common, return_entropy=return_entropy)
    try:
        if config.verify != "off":
            call_number = _call_numbers[model] = _call_numbers.get(model, -1) + 1
            if config.verifies(call_number):
                check_batch(model, batch, config, common)
        return run_tree(model, batch, config, temperature=common, return_entropy=return_entropy)
    except UnsupportedError as error:  # found only while running, such as a layer that bypasses the tree
        batch = batch.with_reason(decline(error, config.on_unsupported).reason)
        return run_dense(model, batch, temperature=common, return_entropy=return_entropy)


def _temperatures(given: float | Sequence[float]) -> tuple[float, list[float] | None]:
    """The common one, and those of the sequences where they have their own, which then count alone."""
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not all(isinstance(value, (int, float, torch.Tensor)) and 0.0 < value < math.inf for value in values):
        raise InvalidInputError(
            f"temperature={given!r}. Expected a finite number above 0, or a list of one per sequence; 1.0 leaves "
            "logits as they are."
        )
    return (1.0, [float(value) for value in values]) if isinstance(given, Iterable) else (float(given), None)


@contextmanager
def tree_attention_scope(model: nn.Module) -> Iterator[nn.Module]:
    """Calls of the model inside take a tree: ``model(**dta_plugin.model_inputs(layout, mask))``.

    Low level: the logits come back in layout order [1, T, V], and nothing checks that every layer used the tree
    (``mask.layers_seen`` says which did). The attention dispatcher stays in front of the model's attention after the
    scope, because a checkpointed layer of a graph made inside may be recomputed later; without tree metadata it is
    bit-identical to the model's own attention.

    Args:
        model: a Hugging Face causal LM, possibly inside PEFT, DDP or FSDP2.

    Yields:
        The same model.

    Raises:
        UnsupportedError: no Hugging Face model is inside, or its attention does not go through transformers'
            AttentionInterface.
    """
    install(causal_lm(model))
    yield model
