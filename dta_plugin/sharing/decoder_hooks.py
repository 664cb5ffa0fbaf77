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
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dta_plugin.attention import TreeMask
from dta_plugin.config import TreeConfig
from dta_plugin.errors import UnsupportedError
from dta_plugin.execution.packed import check_every_layer_hit, model_inputs
from dta_plugin.execution.probing.probe import probe
from dta_plugin.execution.ranks import is_fsdp
from dta_plugin.models.dispatch import install, uninstall
from dta_plugin.models.indexers import index_length_obstacle
from dta_plugin.models.introspection import causal_lm, decoder_of, model_cost
from dta_plugin.models.rotary import padded_length_obstacle
from dta_plugin.models.support import dropout_obstacle
from dta_plugin.models.vision.support import text_model_of
from dta_plugin.option_places import Place, Scope
from dta_plugin.sharing.images import TOKEN_KINDS, arguments_with_images, hand_on, image_arguments
from dta_plugin.sharing.obstacles import model_obstacle, named_arguments, padding_obstacle
from dta_plugin.sharing.padded import OF_THE_LOSS, PaddedBatch, spread
from dta_plugin.tree.cost import estimate
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
            path and ``handle.reason`` says why. A layer that goes around the tree is found in the first call, and is
            an error in either case.
        InvalidInputError: an option of `config` that does not apply.
    """
    config = config or TreeConfig()
    PLACE.check(config)
    base = causal_lm(model)
    decoder = decoder_of(base)
    obstacle = model_obstacle(model)
    if obstacle is not None and config.on_unsupported == "error":
        raise UnsupportedError(f"Prefixes cannot be shared exactly here: {obstacle}; or on_unsupported='dense'.")
    sharing = handle_of(decoder) or PrefixSharing()
    sharing.config = config
    if obstacle is None:
        sharing.attach(base, decoder)
    else:
        sharing.reason = obstacle
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
    """

    def __init__(self) -> None:
        self.config = TreeConfig()
        self.report: TreeReport | None = None
        self.reason = ""
        self.padding_reader: str | None = None
        self.reads_caches = True
        self.is_paused = False
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
        topic, asked = None, arguments.pop("dta_own_path", None)
        batch = asked or self._call_obstacle(decoder, arguments) or self._merged(decoder, arguments)
        if isinstance(batch, PaddedBatch) and self.padding_reader is not None and bool((batch.index < 0).any()):
            batch = f"its rows are padded, and {self.padding_reader}"
        if isinstance(batch, PaddedBatch):
            batch = self._gate(decoder, batch)
            topic = "min_saving" if isinstance(batch, str) else None  # a number in it differs from call to call
        if isinstance(batch, PaddedBatch) and batch.images is not None and is_fsdp(decoder):
            batch = "it has images, whose tower FSDP shards"
        if isinstance(batch, PaddedBatch) and (obstacle := self._probe_obstacle(decoder, batch)) is not None:
            batch = obstacle
        if isinstance(batch, str):
            self.report, self.reason = None, batch
            if not is_cached:
                self.totals.add_dense(batch, topic)
            return ((), arguments) if asked else None
        self.reason = ""
        install(decoder)
        layout = TreeLayout.from_tree(batch.tree, arguments["input_ids"].device)
        mask = TreeMask.from_layout(layout, self.config.backend)
        inputs = model_inputs(layout, mask)
        replaced = {*OF_THE_LOSS, *TOKEN_KINDS, *inputs}
        if batch.images is not None:
            inputs = arguments_with_images(decoder, inputs, batch.images)
            replaced |= image_arguments(decoder, arguments).keys()
        read = {name: value for name, value in arguments.items() if name not in replaced}
        return (), read | inputs | {"dta_rows": batch}

    def restore(self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Behind the decoder: values of tree tokens to those of rows."""
        batch: PaddedBatch | None = kwargs.get("dta_rows")
        if batch is None:
            return output
        mask: TreeMask = kwargs["dta_tree"]
        check_every_layer_hit(decoder, mask)
        output.last_hidden_state = spread(output.last_hidden_state[0], batch)
        if getattr(output, "router_logits", None) is not None:
            output.router_logits = tuple(_spread_flat(logits, batch) for logits in output.router_logits)
        self._count(decoder, batch, "+".join(sorted(mask.backends_used)))
        return output

    def _merged(self, decoder: PreTrainedModel, arguments: dict[str, Any]) -> PaddedBatch | str:
        """The rows of a call, or why they cannot be merged."""
        try:
            return PaddedBatch.from_arguments(arguments, decoder)
        except UnsupportedError as error:
            if self.config.on_unsupported == "error":
                raise
            return str(error)

    def _call_obstacle(self, decoder: PreTrainedModel, arguments: dict[str, Any]) -> str | None:
        """Why this call takes the model's own path, by what may change from call to call."""
        ids = arguments.get("input_ids")
        width = 0 if ids is None else ids.shape[1]
        obstacle = dropout_obstacle(decoder) or padded_length_obstacle(decoder, width)
        obstacle = obstacle or index_length_obstacle(decoder, [width])
        if obstacle is not None and self.config.on_unsupported == "error":
            raise UnsupportedError(f"Prefixes cannot be shared exactly here: {obstacle}; or on_unsupported='dense'.")
        if obstacle is not None:
            return obstacle
        may_decode = self.reads_caches and not (decoder.training and torch.is_grad_enabled())
        if may_decode and getattr(decoder.config, "use_cache", True) and arguments.get("use_cache") is None:
            return "the config's use_cache makes it return a cache; pass use_cache=False"
        outputs = ("output_attentions", "output_hidden_states")
        return next((f"the config's {name} is on" for name in outputs if getattr(decoder.config, name, False)), None)

    def _probe_obstacle(self, decoder: PreTrainedModel, batch: PaddedBatch) -> str | None:
        """Why the decoder's first tree, of a small forest, or its first with an image, is not exact."""
        # Weights that are sharded are being gathered for this very call.
        if self.config.probe == "off" or is_fsdp(decoder):
            return None
        sample = None if batch.images is None else functools.partial(batch.forest, decoder)
        images = 0 if batch.images is None else batch.images.most_per_row
        obstacle = probe(decoder, ["decoder"], self.config.backend, sample=sample, images=images)["decoder"]
        if obstacle is not None and self.config.on_unsupported == "error":
            raise UnsupportedError(obstacle)
        return obstacle

    def _gate(self, decoder: PreTrainedModel, batch: PaddedBatch) -> PaddedBatch | str:
        if not self.config.min_saving:
            return batch
        saving = estimate(batch.tree, model_cost(decoder), 0, 0).saving
        if saving >= self.config.min_saving:
            return batch
        return f"only {saving:.0%} of dense FLOPs saved, min_saving {self.config.min_saving:.0%}"

    def _count(self, decoder: PreTrainedModel, batch: PaddedBatch, backend: str) -> None:
        tree = batch.tree
        cost = estimate(tree, model_cost(decoder), 0, 0)
        self.report = TreeReport(
            tree=tree,
            chunks=1,
            executor="packed",
            backend=backend,
            reason=f"{cost.saving:.0%} of the decoder's dense FLOPs saved",
            cost=cost,
        )
        self.totals.add_tree(self.report)
        self.shared_calls += 1
        self.flat_tokens += tree.flat_tokens
        self.tree_tokens += tree.tree_tokens


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
