"""TRL configs with the plugin's options: `use_dta`, and every field of TreeConfig as `dta_<field>`.

They are ordinary dataclasses, so TrlParser and HfArgumentParser offer the fields on the command line and in YAML.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, make_dataclass

from trl import GRPOConfig, RLOOConfig

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.option_types import types_of

_overrides: dict[str, object] = {}


def override(config: TreeConfig | None, names: Iterable[str] = ()) -> None:
    """From now on these options of `config` go before what trainer arguments that carry options say; None: no more."""
    _overrides.clear()
    if config is not None:
        _overrides.update({name: name == "use_dta" or getattr(config, name.removeprefix("dta_")) for name in names})


def tree_config(args: object) -> TreeConfig | None:
    """The TreeConfig of trainer arguments that carry the options, or None if they carry none or `use_dta` is off."""
    if not (hasattr(args, "use_dta") and _overrides.get("use_dta", args.use_dta)):
        return None
    own = {f.name: getattr(args, f"dta_{f.name}", f.default) for f in fields(TreeConfig)}
    try:
        return TreeConfig.from_options({name: _overrides.get(f"dta_{name}", value) for name, value in own.items()})
    except InvalidInputError as error:
        raise error.named(f"dta_{error.option}") from None


TreeArguments = make_dataclass(
    "TreeArguments",
    [
        (
            "use_dta",
            bool,
            field(default=True, metadata={"help": "Compute the tokens that rollouts share once (dta-plugin)."}),
        ),
        *(
            (
                f"dta_{f.name}",
                types_of(TreeConfig)[f.name],
                field(default=f.default, metadata={"help": f.metadata["help"]}),
            )
            for f in fields(TreeConfig)
        ),
    ],
)


class Validated:
    """Where the flag is in a config, trainings are watched: one that ran no tree says so."""

    def __post_init__(self) -> None:
        if tree_config(self) is not None:
            from dta_plugin.adapters.trl.idle import watch

            watch()
        super().__post_init__()  # type: ignore[misc]


@dataclass
class TreeGRPOConfig(Validated, TreeArguments, GRPOConfig):  # type: ignore[misc, valid-type]
    """GRPOConfig with `use_dta` (on) and the `dta_*` options; see TreeConfig for their meaning."""


@dataclass
class TreeRLOOConfig(Validated, TreeArguments, RLOOConfig):  # type: ignore[misc, valid-type]
    """RLOOConfig with `use_dta` (on) and the `dta_*` options; see TreeConfig for their meaning."""
