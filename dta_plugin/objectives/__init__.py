"""What is optimised: ELBO terms of diffusion LMs, the bound of BGPO, and what it is compared with."""

from dta_plugin.objectives.bgpo import SampleLoss, bound_gap, bound_terms, per_sample_losses
from dta_plugin.objectives.comparison import sampled_elbo_ratio, token_ratio_terms
from dta_plugin.objectives.elbo import elbo_term, length_scale, masked_log_probs, sample_term

__all__ = [
    "SampleLoss",
    "bound_gap",
    "bound_terms",
    "elbo_term",
    "length_scale",
    "masked_log_probs",
    "per_sample_losses",
    "sample_term",
    "sampled_elbo_ratio",
    "token_ratio_terms",
]
