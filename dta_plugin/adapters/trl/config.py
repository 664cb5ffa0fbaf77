"""TRL configs with the plugin's options: `use_dta`, and every field of TreeConfig as `dta_<field>`.

They are ordinary dataclasses, so TrlParser and HfArgumentParser offer the fields on the command line and in YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import get_type_hints

from trl import GRPOConfig, RLOOConfig

from dta_plugin.config import TreeConfig


def tree_config(args: object) -> TreeConfig | None:
    """The TreeConfig of trainer arguments that carry the options, or None if they carry none or `use_dta` is off."""
    if not getattr(args, "use_dta", False):
        return None
    return TreeConfig.from_options({f.name: getattr(args, f"dta_{f.name}", f.default) for f in fields(TreeConfig)})


_types = get_type_hints(TreeConfig)
TreeArguments = make_dataclass(
    "TreeArguments",
    [
        (
            "use_dta",
            bool,
            field(default=True, metadata={"help": "Compute the tokens that rollouts share once (dta-plugin)."}),
        ),
        *(
            (f"dta_{f.name}", _types[f.name], field(default=f.default, metadata=dict(f.metadata)))
            for f in fields(TreeConfig)
        ),
    ],
)


class _Validated:
    def __post_init__(self) -> None:
        if tree_config(self) is not None:
            from dta_plugin.adapters.trl.idle import watch

            watch()
        super().__post_init__()  # type: ignore[misc]


@dataclass
class TreeGRPOConfig(_Validated, TreeArguments, GRPOConfig):  # type: ignore[misc, valid-type]
    """GRPOConfig with `use_dta` (on) and the `dta_*` options; see TreeConfig for their meaning."""


@dataclass
class TreeRLOOConfig(_Validated, TreeArguments, RLOOConfig):  # type: ignore[misc, valid-type]
    """RLOOConfig with `use_dta` (on) and the `dta_*` options; see TreeConfig for their meaning."""
