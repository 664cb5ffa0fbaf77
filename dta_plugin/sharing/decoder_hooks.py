"""`share_prefixes`: every padded batch that a model is called with runs its decoder once per shared token.

Two hooks around the decoder: the first turns the rows into one packed tree, the second spreads the hidden states back
to [B, L, H], so that the model's own head, pooling and loss, and any trainer's, run as they are. What the hooks have to
tell each other and the attention layers travels in the call's keyword arguments. A third hook, around the whole model,
looks at the labels alone: padding has no hidden states in a tree, so a loss that reads them takes the model's own path.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dta_plugin.attention import TreeMask
from dta_plugin.config import TreeConfig
from dta_plugin.decline import Decline, decline
from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.packed import check_every_layer_hit, model_inputs
from dta_plugin.models.dispatch import install, uninstall
from dta_plugin.models.introspection import causal_lm, decoder_of
from dta_plugin.models.vision.support import text_model_of
from dta_plugin.option_places import Place, Scope
from dta_plugin.sharing.decisions import Call, found_too_late, report_of
from dta_plugin.sharing.images import TOKEN_KINDS, arguments_with_images, hand_on, image_arguments
from dta_plugin.sharing.obstacles import model_obstacle, named_arguments, padding_obstacle
from dta_plugin.sharing.padded import OF_THE_LOSS, PaddedBatch, spread
from dta_plugin.tree.layout import TreeLayout
from dta_plugin.tree.report import TreeReport
from dta_plugin.tree.totals import Totals

PLACE = Place(
    "in share_prefixes",
    {Scope.CALL},
    "each call runs its batch as one packed tree, and the loss is its caller's (for trees larger than memory use "
    "dta_plugin.sequence_logprobs, which streams)",
    {"picture": "a trainer has a first step (dta_plugin.tree.picture.draw_svg(handle.report.tree) draws any call)"},
)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def share_prefixes(model: nn.Module, config: TreeConfig | None = None) -> PrefixSharing:
    """From now on the model computes what the rows of a batch share once, forward and backward.

    Calls with ``input_ids`` [B, L] of at least two rows and, where rows are padded, ``attention_mask`` [B, L] are
    shared. Outputs at real tokens and all gradients are those of the model's own path up to the order of sums; hidden
    states of padding are 0. A batch that shares nothing is one packed row, which is exact, too, and spares the padding.
    Other calls take the model's own path, untouched: caches (generation), embeddings as inputs, packed sequences,
    hidden states or attention weights in the output, labels that score what is read from padding. In evaluation mode
    or without gradients, so does a call that leaves ``use_cache`` to a config that has it on: its caller may want the
    cache.

    Args:
        model: a decoder of Hugging Face with any head (AutoModelForCausalLM, AutoModelForSequenceClassification, ...),
            before or after PEFT, DDP or FSDP2 wrap it. Its parameters, state dict and class stay as they are.
        config: ``backend``, ``min_saving`` (a share of the decoder's FLOPs), ``probe`` and ``on_unsupported`` apply;
            None for the defaults.

    Returns:
        A handle: ``handle.remove()`` undoes it, also at the end of ``with share_prefixes(model):``. A model that shares
        already keeps its handle and takes the new config.

    Raises:
        UnsupportedError: the tree would not be exact. With ``config.on_unsupported == "dense"`` the model keeps its own
            path and ``handle.reason`` says why. Where no probe looks for a layer that goes around the tree
            (``probe="off"``, weights sharded by FSDP), the first call finds it, and it is an error in either case.
        InvalidInputError: an option of `config` that does not apply.
    """
    config = config or TreeConfig()
    PLACE.check(config)
    base = causal_lm(model)
    decoder = decoder_of(base)
    obstacle = model_obstacle(model)
    declined = None if obstacle is None else decline(obstacle, config.on_unsupported)
    sharing = handle_of(decoder) or PrefixSharing()
    sharing.config = config
    if declined is None:
        sharing.attach(base, decoder)
    else:
        sharing.reason = declined.reason
    return sharing


class PrefixSharing:
    """Handle of a model that shares prefixes.

    report: what the last call shared, None if it took the model's own path. reason: why it did, else "".
    calls, shared_calls, flat_tokens, tree_tokens: counted since the handle was made; tokens of shared calls only.
    totals: the same with reasons and costs, since whoever trains began.
    cached_calls: those that read a cache or ask for one, as generation does.
    padding_reader: who may read the hidden states of padding, in words; then padded rows take the model's own path.
    reads_caches: whether callers in evaluation mode, or without gradients, may want a cache that they did not ask for.
    is_paused: calls take the model's own path for now, and are not counted.
    callers_obstacle: given the decoder, what else is in the way of a call, in words, or None.
    """

    def __init__(self) -> None:
        self.config = TreeConfig()
        self.report: TreeReport | None = None
        self.reason = ""
        self.padding_reader: str | None = None
        self.reads_caches = True
        self.is_paused = False
        self.callers_obstacle: Callable[[PreTrainedModel], str | None] | None = None
        self.calls = self.cached_calls = self.shared_calls = self.flat_tokens = self.tree_tokens = 0
        self.totals = Totals()
        self._decoder: PreTrainedModel | None = None
        self._hooks: list[RemovableHandle] = []
        self._watched: list[PreTrainedModel] = []

    def attach(self, base: PreTrainedModel, decoder: PreTrainedModel) -> None:
        """Put the hooks on a decoder, once, and on every model that has it."""
        if not self._hooks:
            self._decoder = decoder
            self._hooks = [
                decoder.register_forward_pre_hook(_Hook(self, "merge"), with_kwargs=True),
                decoder.register_forward_hook(_Hook(self, "restore"), with_kwargs=True),
            ]
            if (text := text_model_of(decoder)) is not decoder:
                self._hooks.append(text.register_forward_pre_hook(hand_on, with_kwargs=True))
        if base is not decoder and not any(base is known for known in self._watched):
            self._watched.append(base)
            self._hooks.append(base.register_forward_pre_hook(_Hook(self, "look_at_labels"), with_kwargs=True))

    @property
    def is_attached(self) -> bool:
        """Whether the model shares: it can, and `remove` has not been called."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Back to the model's own path. Graphs of shared calls may still be alive; attention waits for the last."""
        for hook in self._hooks:
            hook.remove()
        if self._decoder is not None:
            uninstall(self._decoder)
        self._decoder, self._hooks, self._watched = None, [], []

    def __enter__(self) -> PrefixSharing:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def look_at_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """In front of the whole model: a loss that reads padding needs what the model's own path has there."""
        obstacle = None if self.is_paused else padding_obstacle(model, named_arguments(model, args, kwargs))
        return None if obstacle is None else (args, kwargs | {"dta_own_path": obstacle})

    def merge(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """In front of the decoder: rows to one packed tree."""
        arguments = named_arguments(decoder, args, kwargs)
        if "dta_tree" in arguments or self.is_paused:  # merged already, by an executor
            return None
        self.calls += 1
        is_cached = bool(arguments.get("use_cache")) or arguments.get("past_key_values") is not None
        self.cached_calls += is_cached
        asked = arguments.pop("dta_own_path", None)
        batch = Decline(asked) if asked else self._call(decoder, arguments).decided()
        if isinstance(batch, Decline):
            self.report, self.reason = None, batch.reason
            if not is_cached:
                self.totals.add_dense(batch.reason, batch.topic)
            return ((), arguments) if asked else None
        self.reason = ""
        return (), self._as_tree(decoder, arguments, batch)

    def _call(self, decoder: PreTrainedModel, arguments: dict[str, Any]) -> Call:
        return Call(decoder, arguments, self.config, self.padding_reader, self.reads_caches, self.callers_obstacle)

    def _as_tree(self, decoder: PreTrainedModel, arguments: dict[str, Any], batch: PaddedBatch) -> dict[str, Any]:
        """The arguments of the same call with one packed tree."""
        install(decoder)
        layout = TreeLayout.from_tree(batch.tree, arguments["input_ids"].device)
        mask = TreeMask.from_layout(layout, self.config.backend)
        inputs = model_inputs(layout, mask)
        replaced = {*OF_THE_LOSS, *TOKEN_KINDS, *inputs}
        if batch.images is not None:
            inputs = arguments_with_images(decoder, inputs, batch.images)
            replaced |= image_arguments(decoder, arguments).keys()
        read = {name: value for name, value in arguments.items() if name not in replaced}
        return read | inputs | {"dta_rows": batch}

    def restore(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Behind the decoder: values of tree tokens to those of rows."""
        batch: PaddedBatch | None = kwargs.get("dta_rows")
        if batch is None:
            return output
        mask: TreeMask = kwargs["dta_tree"]
        try:
            check_every_layer_hit(decoder, mask)
        except UnsupportedError as error:
            raise found_too_late(decoder, self.config, error) from None
        output.last_hidden_state = spread(output.last_hidden_state[0], batch)
        if getattr(output, "router_logits", None) is not None:
            output.router_logits = tuple(_spread_flat(logits, batch) for logits in output.router_logits)
        self._count(decoder, batch, "+".join(sorted(mask.backends_used)))
        return output

    def _count(self, decoder: PreTrainedModel, batch: PaddedBatch, backend: str) -> None:
        self.report = report_of(decoder, batch, backend)
        self.totals.add_tree(self.report)
        self.shared_calls += 1
        self.flat_tokens += batch.tree.flat_tokens
        self.tree_tokens += batch.tree.tree_tokens


class _Hook:
    """A handle's method as a hook. In a pickle of the model, one that does nothing stands for it: who loads the model
    may not have this package.
    """

    def __init__(self, handle: PrefixSharing, method: str) -> None:
        self.handle, self.method = handle, method

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return getattr(self.handle, self.method)(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(copy.deepcopy(self.handle, memo), self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (sys.audit, "forward")  # takes any arguments, returns None


def handle_of(decoder: nn.Module) -> PrefixSharing | None:
    """The handle of a decoder that shares already; a deep copy of a model has its own."""
    return next((hook.handle for hook in decoder._forward_pre_hooks.values() if isinstance(hook, _Hook)), None)


def _spread_flat(values: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Router logits [T, experts] -> [B * L, experts]; the router loss leaves padding out by the attention mask."""
    return spread(values.reshape(batch.tree.tree_tokens, -1), batch).flatten(0, 1)
