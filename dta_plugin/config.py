"""TreeConfig: every knob of the plugin, validated when constructed.

The same fields appear as `--dta_<name>` on the command line, as `dta_<name>` in trainer configs and YAML recipes, and
as keyword arguments of `dta_plugin.enable`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from dta_plugin.errors import InvalidInputError
from dta_plugin.option_places import Scope, option
from dta_plugin.option_types import check_type, choices, types_of
from dta_plugin.token_selection.select import TokenSelection

_QUOTE = "a bare off in YAML means false: quote it"
_SVG_EXPECTED = "Expected a file that ends in .svg, where one can be written"


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeConfig:
    """How prefix-tree execution runs: the fields, each with its meaning, are the options of the command line.

    ``TreeConfig.__dataclass_fields__[name].metadata["help"]`` and ``python -m dta_plugin.run --help`` explain them.
    The `token_*` options are those of NAT (arXiv 2603.06619).

    Raises:
        InvalidInputError: a value that is not one of those described, or options that exclude each other.
    """

    backend: Literal["auto", "cpu", "flex", "reference", "triton"] = option(
        "auto",
        "Who computes attention: auto (Triton kernels on NVIDIA GPUs, the native path on CPUs, FlexAttention where "
        "neither serves), triton, cpu, flex, or reference (dense mask, slow, for checking).",
        Scope.CALL,
    )
    executor: Literal["auto", "packed", "streamed"] = option(
        "auto",
        "Who calls the model: packed (the whole tree in one call), streamed (chunk by chunk, forward and backward, for "
        "trees larger than memory), or auto (packed where the tree fits max_tree_tokens_per_chunk, else streamed).",
        Scope.BATCH,
        elsewhere="packed",
    )
    max_tree_tokens_per_chunk: int | None = option(
        None,
        "Most tree tokens whose activations are alive at once: the memory knob. None: from free memory. Larger trees "
        "are streamed; where they cannot be, as with executor=packed, they run in one call, and the report says so.",
        Scope.BATCH,
    )
    min_saving: float = option(
        0.0,
        "Share of the dense path's time that the tree must save, in [0, 1); below it the dense path runs. Time is "
        "predicted if `dta calibrate` has measured it, else FLOPs count, of which a tree never needs more: 0 then "
        "means always the tree, which without sharing is plain padding-free packing.",
        Scope.CALL,
    )
    calibration: str = option(
        "auto",
        "Measured speeds to decide and balance by: auto (what `dta calibrate` stored for this machine and model; FLOPs "
        "where there is nothing), off (FLOPs), or the file that it wrote with --output.",
        Scope.WINDOW,
        elsewhere="off",
    )
    probe: Literal["auto", "off"] = option(
        "auto",
        "Before a model's first tree, run a small forest both ways and refuse the tree where log-probs differ by more "
        "than rounding: auto (once per model, set of adapters and precision), or off.",
        Scope.CALL,
    )
    verify: str = option(
        "off",
        "Compare log-probs and every gradient with the dense path, within what rounding explains: off, first (first "
        "call only), or every:N (every N-th call).",
        Scope.BATCH,
    )
    regroup: Literal["auto", "always", "never"] = option(
        "auto",
        "Put siblings into one micro-batch after the framework has shuffled and split a generation batch: auto (where "
        "the optimizer step's gradient cannot change), always, or never.",
        Scope.LOSS,
        elsewhere="never",
    )
    merge_window: Literal["auto", "always", "never"] = option(
        "auto",
        "One tree for all micro-batches of a gradient-accumulation window, so that siblings meet even with a batch of "
        "one: auto (where that saves more than separate trees), always, or never. Same gradient, loss and metrics.",
        Scope.WINDOW,
        elsewhere="never",
    )
    balance_ranks: Literal["never", "always"] = option(
        "never",
        "Move rows between ranks after a generation, within their optimizer step, so that siblings meet and every rank "
        "costs alike: never, or always (where the gradient cannot change). Ranks exchange token ids and moved rows.",
        Scope.WINDOW,
    )
    prune: Literal["auto", "always", "never"] = option(
        "auto",
        "Leave tokens whose log-probs no loss reads (rows with advantage 0, masked turns) out of the update, exactly: "
        "auto (where the trainer's loss is known), always (a loss that is not known is taken to read what the "
        "framework's does), or never (all tokens run, as for the metric `entropy` of all rows).",
        Scope.LOSS,
        elsewhere="never",
    )
    token_selection: str = option(
        "all",
        "Update on a random subset of completion tokens, weighted to have all tokens' loss and gradient on average "
        "(NAT): all (no subset), rpc (a prefix of every row; what is cut off is not computed), rpc-uniform or "
        "rpc-two-point (other laws of cuts), or urs (single tokens; saves only the LM head).",
        Scope.LOSS,
    )
    token_budget: float | None = option(
        None,
        "Share of completion tokens that token_selection keeps on average, in (0, 1]. None: 0.5.",
        Scope.LOSS,
    )
    token_min_prefix: int | None = option(
        None,
        "First tokens of every completion that token_selection always keeps. None: 1.",
        Scope.LOSS,
    )
    token_floor: float | None = option(
        None,
        "Smallest probability with which token_selection keeps a token; the largest weight is its inverse. None: 0.8 "
        "times token_budget.",
        Scope.LOSS,
    )
    token_sharing: str | None = option(
        None,
        "How rpc draws its cuts: row (each by itself), or group (spread evenly over siblings, so that a group's "
        "gradient varies less). None: group.",
        Scope.LOSS,
    )
    on_unsupported: Literal["error", "dense"] = option(
        "error",
        "What to do where the tree would not be exact: error, or dense (run the dense path, say so once).",
        Scope.CALL,
    )
    on_nonfinite: Literal["auto", "error", "pass"] = option(
        "auto",
        "What to do with log-probs that are NaN or infinite: error, pass (the loss gets them), or auto (pass where a "
        "loss scaler, as with fp16, will skip the step; else error).",
        Scope.BATCH,
        elsewhere="pass",
    )
    picture: str | None = option(
        None,
        "SVG file into which the first process draws the first tree that is trained on, as `dta inspect --svg` draws "
        "one: a row per sequence, darker where more of them share. Its folder is made if need be, an existing file is "
        "overwritten. None: no picture.",
        Scope.TRAINING,
    )

    def __post_init__(self) -> None:
        for name, kind in types_of(TreeConfig).items():
            check_type(name, getattr(self, name), kind)
        self.selection()
        _check_calibration(self.calibration)
        _check_picture(self.picture)
        if self.max_tree_tokens_per_chunk is not None and self.max_tree_tokens_per_chunk < 1:
            raise _invalid("max_tree_tokens_per_chunk", self.max_tree_tokens_per_chunk, "Expected None or at least 1.")
        if not 0.0 <= self.min_saving < 1.0:
            raise _invalid("min_saving", self.min_saving, "Expected a share in [0, 1).")
        if not re.fullmatch(r"off|first|every:[1-9]\d*", str(self.verify)):
            raise _invalid("verify", self.verify, f"Expected 'off', 'first' or 'every:N' with N >= 1 ({_QUOTE}).")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TreeConfig:
        """Build from a dict.

        Args:
            options: values by the names of the fields; what is not named keeps its default.

        Returns:
            The validated configuration.

        Raises:
            InvalidInputError: names unknown options and lists the known ones, or an invalid value.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InvalidInputError(f"Unknown option(s) {', '.join(unknown)}. Expected among: {', '.join(known)}.")
        return cls(**options)

    def selection(self) -> TokenSelection | None:
        """What the `token_*` options choose.

        Returns:
            The selection; None for all tokens.

        Raises:
            InvalidInputError: an option that has no effect, or a value out of range.
        """
        names = ("budget", "min_prefix", "floor", "sharing")
        given = {name: value for name in names if (value := getattr(self, f"token_{name}")) is not None}
        scheme = self.token_selection
        without_effect = {"all": names, "urs": ("sharing",), "rpc-uniform": ("floor",)}
        for name in without_effect.get(scheme, ()):
            if name in given:
                raise InvalidInputError(
                    f"token_{name}={given[name]!r} does nothing with token_selection={scheme!r}. Leave it out, or "
                    "choose another token_selection (rpc uses all of the token_* options).",
                    option=f"token_{name}",
                )
        return None if scheme == "all" else TokenSelection(scheme=scheme, **given)

    def verifies(self, call_number: int) -> bool:
        """Whether the call with this number, from 0 on, is to be compared with the dense path."""
        if self.verify == "off":
            return False
        return (
            call_number == 0 if self.verify == "first" else call_number % int(self.verify.removeprefix("every:")) == 0
        )


BACKENDS = choices(types_of(TreeConfig)["backend"])


def _invalid(name: str, value: object, expected: str) -> InvalidInputError:
    return InvalidInputError(f"{name}={value!r}. {expected}", option=name)


def _check_calibration(value: object) -> None:
    expected = "Expected auto, off or a file that `dta calibrate --output` wrote"
    if not isinstance(value, str) or not value:
        raise _invalid("calibration", value, f"{expected} ({_QUOTE}).")
    if value not in ("auto", "off") and not Path(value).expanduser().is_file():
        raise InvalidInputError(f"calibration={value!r} is no file. {expected}.", option="calibration")


def _check_picture(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or Path(value).suffix.lower() != ".svg":
        raise _invalid("picture", value, f"{_SVG_EXPECTED}.")
    _check_writable(value)


@functools.cache  # good once, good for ever: configs are built anew all through a training, which this must not end
def _check_writable(picture: str) -> None:
    """A folder that is missing is no fault: it is made, or exists on the node that draws."""
    file = Path(os.path.expanduser(picture))
    if file.is_dir():
        raise InvalidInputError(f"picture={picture!r} is a folder. {_SVG_EXPECTED}.", option="picture")
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise InvalidInputError(f"picture={picture!r}: {folder} is no folder. {_SVG_EXPECTED}.", option="picture")
    target = file if file.exists() else file.parent
    if target.exists() and not os.access(target, os.W_OK):
        raise InvalidInputError(
            f"picture={picture!r}: this process may not write to {target}. {_SVG_EXPECTED}.", option="picture"
        )
