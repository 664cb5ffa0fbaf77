"""The plugin's options in a verl command: `+actor_rollout_ref.rollout.custom.dta.<field of TreeConfig>=<value>`.

`use_dta=false` among them leaves verl's own path in place, on all tokens, for a comparison with the same command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dta_plugin.config import TreeConfig
from dta_plugin.errors import InvalidInputError
from dta_plugin.option_places import Place, Scope

KEY = "actor_rollout_ref.rollout.custom.dta"
DIFFUSION = f"{KEY}.diffusion"  # of diffusion LMs, which have no prefix trees: `adapters.verl_plugin.diffusion`
_PLACE = Place(
    "with verl",
    {Scope.CALL, Scope.BATCH, Scope.TRAINING, Scope.LOSS},
    "verl decides",
    {
        "merge_window": "ppo_max_token_len_per_gpu with use_dynamic_bsz=True decides how much runs as one tree",
        "calibration": "min_saving goes by FLOPs here",
        "balance_ranks": "the trainer deals rows out to all ranks by tree cost, which regroup=never switches off",
    },
)


def fall_back(key: str) -> str:
    """How a command asks for verl's own path. key: where its options are."""
    return f"+{key}.on_unsupported=dense"


def dta_options(rollout: Any) -> dict[str, Any]:
    """What a rollout config (DictConfig, or verl's RolloutConfig) has for the plugin. InvalidInputError for no dict."""
    custom = rollout.get("custom") or {}
    options = custom.get("dta")
    if isinstance(options, DictConfig):
        options = OmegaConf.to_container(options, resolve=True)
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise InvalidInputError(f"Got {KEY}={options!r}. Expected fields of it, such as +{KEY}.executor=packed.")
    return {str(name): value for name, value in options.items()}


def check_places(config: Any, key: str) -> None:
    """Raises InvalidInputError where a run's configuration has an entry `dta` anywhere else than at `key`.

    config: a DictConfig of the whole run. Hydra's `+` takes any name, and nothing reads what is in another place.
    """
    places = _places_of("dta", OmegaConf.to_container(config, resolve=False), ())
    elsewhere = next((place for place in places if place != key), None)
    if elsewhere is not None:
        raise InvalidInputError(f"Got options in {elsewhere}, where nothing reads them. Expected +{key}.<option>.")


def _places_of(name: str, node: Any, above: tuple[str, ...]) -> Iterator[str]:
    """Where in a configuration, dotted, mappings have an entry of that name."""
    if not isinstance(node, Mapping):
        return
    for key, below in node.items():
        here = (*above, str(key))
        if key == name:
            yield ".".join(here)
        else:
            yield from _places_of(name, below, here)


def tree_config(rollout: Any) -> TreeConfig | None:
    """The options in a rollout config (as `dta_options`); None where `use_dta` is false, and for diffusion LMs.

    Raises InvalidInputError for an unknown option, naming the known ones, and for a value that is not allowed.
    """
    options = dta_options(rollout)
    if "diffusion" in options:
        return None
    return checked_options(options, KEY)


def checked_options(options: Mapping[str, Any], key: str) -> TreeConfig | None:
    """Options as a TreeConfig; None where `use_dta` is false. key: where in the configuration they are.

    Raises InvalidInputError as `tree_config` does.
    """
    if not isinstance(options, Mapping):
        raise InvalidInputError(f"Got {key}={options!r}. Expected fields of it, such as +{key}.executor=packed.")
    given = {str(name): value for name, value in options.items()}
    use_dta = given.pop("use_dta", True)
    if not isinstance(use_dta, bool):
        raise InvalidInputError(f"Got {key}.use_dta={use_dta!r}. Expected true or false.")
    try:
        config = TreeConfig.from_options(given)
    except InvalidInputError as error:
        named = error.named(f"{key}.{error.option}") if error.option else InvalidInputError(f"In {key}: {error}")
        raise named from None
    _PLACE.check(config, given, prefix=f"{key}.")
    return config if use_dta else None
