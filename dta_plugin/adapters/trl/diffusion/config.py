"""DiffusionGRPOConfig: a GRPOConfig with what reinforcement learning of a diffusion LM adds, validated as a whole.

Its own fields are those of DiffusionOptions, and how evaluation samples. It is an ordinary dataclass: TrlParser offers
the fields on the command line and in YAML. Options of GRPOConfig that have no meaning for a diffusion LM raise
InvalidInputError when they are set, instead of being ignored (`unsupported_options`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import get_type_hints

from trl import GRPOConfig

from dta_plugin.adapters.trl.diffusion.unsupported_options import check_options
from dta_plugin.diffusion import SamplerConfig
from dta_plugin.diffusion.objectives.gdsd import clamp_range
from dta_plugin.errors import InvalidInputError
from dta_plugin.training.diffusion.options import CLIPPED, DiffusionOptions

_types = get_type_hints(DiffusionOptions)
DiffusionArguments = make_dataclass(
    "DiffusionArguments",
    [
        (f.name, _types[f.name], field(default=f.default, metadata={"help": f.metadata["help"]}))
        for f in fields(DiffusionOptions)
    ],
)


@dataclass
class DiffusionGRPOConfig(DiffusionArguments, GRPOConfig):  # type: ignore[misc, valid-type]
    """How DiffusionGRPOTrainer trains. Raises InvalidInputError for values that cannot be, or that would be ignored.

    Of GRPOConfig, max_completion_length is the length of the canvas, temperature that of sampling (likelihoods are
    taken at temperature 1), beta the weight of the KL penalty, epsilon the clip range of diffu-grpo, gdsd and
    trajectory.
    """

    eval_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of sampling in evaluation; papers report 0. None: that of training."},
    )
    eval_max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Length of the canvas in evaluation, at as many tokens per model call as in training. None: that "
            "of training."
        },
    )

    def __post_init__(self) -> None:
        check_options(self)
        own = self.diffusion_options
        default = next(f.default for f in fields(GRPOConfig) if f.name == "epsilon")
        own.check_use("epsilon", self.epsilon, default, CLIPPED)
        if self.objective == "gdsd":
            clamp_range(self.epsilon)
        self.sampler_config(own.attention_block_length)
        self.eval_sampler_config(own.attention_block_length)
        super().__post_init__()
        if getattr(self, "deepspeed_plugin", None) is not None:
            raise InvalidInputError(
                "The launcher asks for DeepSpeed. Expected DDP, FSDP or one process: DeepSpeed reduces gradients at "
                "accumulation boundaries of its own, and one backward pass per ELBO sample would be averaged wrongly. "
                "Use accelerate's fsdp_version: 2."
            )

    @property
    def diffusion_options(self) -> DiffusionOptions:
        """The fields that are not GRPOConfig's."""
        return DiffusionOptions(**{f.name: getattr(self, f.name) for f in fields(DiffusionOptions)})

    @property
    def canvas(self) -> int:
        """Tokens that are sampled per completion."""
        if self.max_completion_length is None:
            raise InvalidInputError("max_completion_length=None. Expected the length of the canvas, at least 1.")
        return self.max_completion_length

    def sampler_config(self, attention_block_length: int | None) -> SamplerConfig:
        """How completions are sampled from a model with such attention blocks (None: full attention)."""
        return self.diffusion_options.sampler_config(self.canvas, self.temperature, attention_block_length)

    def eval_sampler_config(self, attention_block_length: int | None) -> SamplerConfig:
        """The same for evaluation."""
        own = self.diffusion_options
        length = self.canvas if self.eval_max_completion_length is None else self.eval_max_completion_length
        if own.diffusion_steps is not None:
            steps, rest = divmod(own.diffusion_steps * length, self.canvas)
            if rest:
                raise InvalidInputError(
                    f"eval_max_completion_length={length} with diffusion_steps={own.diffusion_steps} for "
                    f"max_completion_length={self.canvas}. Expected a length at which as many tokens per model call "
                    "make a whole number of calls; use a multiple of max_completion_length."
                )
            own = replace(own, diffusion_steps=steps)
        temperature = self.temperature if self.eval_temperature is None else self.eval_temperature
        try:
            return own.sampler_config(length, temperature, attention_block_length)
        except InvalidInputError as error:
            raise InvalidInputError(f"In evaluation: {error}") from None
