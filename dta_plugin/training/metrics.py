"""Every metric: its name, unit, and how it is put together. `python -m dta_plugin.training.metrics` prints the table.

Adapters log these names and no others. What a framework does with the values of several optimizer steps, such as their
mean in a log entry, is its own.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Reduction = Literal["sum", "mean", "max"]


class MetricInfo(NamedTuple):
    """One metric. reduction: of the values of several micro-batches, or ranks, to one."""

    name: str
    unit: str
    reduction: Reduction
    meaning: str


_LOAD = "largest over mean, 1 if even"
METRICS = (
    MetricInfo("dta/flat_tokens", "tokens", "sum", "of the rows that ran as trees, what rows share counted in each"),
    MetricInfo("dta/tree_tokens", "tokens", "sum", "of those trees, what rows share counted once"),
    MetricInfo("dta/pruned_tokens", "tokens", "sum", "left out, because no loss reads their log-probs"),
    MetricInfo("dta/compression_ratio", "ratio", "mean", "flat over tree tokens, where a loss reads any"),
    MetricInfo("dta/flops_ceiling", "ratio", "mean", "largest possible speed-up over the dense path by FLOPs"),
    MetricInfo("dta/chunks", "model calls", "sum", "of the forward pass: 1 per packed tree, more if streamed"),
    MetricInfo("dta/recomputed_tokens", "tokens", "sum", "that a streamed backward pass ran forward again"),
    MetricInfo("dta/dense_fallback", "share of micro-batches", "mean", "that took the framework's own path"),
    MetricInfo("dta/streamed", "share of micro-batches", "mean", "that ran in chunks"),
    MetricInfo("dta/micro_batches", "count", "sum", "of an optimizer step, on one rank"),
    MetricInfo("dta/kept_fraction", "share of tokens", "mean", "that carry loss and were drawn (token selection)"),
    MetricInfo("dta/mean_weight", "weight", "mean", "of tokens that carry loss; 1 on average over drawings"),
    MetricInfo("dta/max_weight", "weight", "max", "the largest of a token, one over its probability"),
    MetricInfo("dta/effective_sample_size", "share of tokens", "mean", "(sum w)^2 / sum w^2 over tokens with loss"),
    MetricInfo(
        "dta/predicted_variance",
        "ratio",
        "mean",
        "variance of the gradient over drawings, to its square, if those of tokens are unrelated and alike in size",
    ),
    MetricInfo("dta/micro_batch_load_predicted", "ratio", "mean", f"cost of micro-batches, by tokens: {_LOAD}"),
    MetricInfo("dta/micro_batch_load_measured", "ratio", "mean", f"seconds of micro-batches: {_LOAD}"),
    MetricInfo("dta/rank_load_predicted", "ratio", "mean", f"cost of ranks, by tokens: {_LOAD}"),
    MetricInfo("dta/rank_load_measured", "ratio", "mean", f"seconds that ranks work by themselves: {_LOAD}"),
    MetricInfo("dta/duplicated_prefix_tokens", "tokens", "sum", "computed more than once, because siblings are apart"),
    MetricInfo("dta/groups", "count", "sum", "in the batch"),
    MetricInfo("dta/groups_split", "count", "sum", "over several ranks or optimizer steps"),
    MetricInfo("dta/token_reduction_ideal", "ratio", "mean", "flat over tree tokens, if all siblings met"),
    MetricInfo("dta/token_reduction_of_shares", "ratio", "mean", "the same, of each rank's rows of a step"),
    MetricInfo("dta/total_flat_tokens", "tokens", "sum", "at the end of a training: `dta/flat_tokens` of all of it"),
    MetricInfo("dta/total_tree_tokens", "tokens", "sum", "at the end of a training: `dta/tree_tokens` of all of it"),
    MetricInfo("dta/total_flops_saved", "share of FLOPs", "mean", "at the end: what sharing has saved"),
    MetricInfo("dta/total_seconds_saved", "seconds", "sum", "at the end, where calibrated: the same, predicted"),
    MetricInfo("dta/total_dense_fallback", "share of calls", "mean", "at the end: that took the framework's own path"),
    MetricInfo("diffusion/elbo", "nats per token", "mean", "estimate of the likelihood's lower bound"),
    MetricInfo("diffusion/log_prob", "nats per token", "mean", "fully masked (diffu-grpo), or of steps (trajectory)"),
    MetricInfo("diffusion/bound_gap", "advantage per row", "mean", "what the bound gives away on the samples (bgpo)"),
    MetricInfo("diffusion/mean_abs_d", "nats, scaled by length_norm", "mean", "how far the policy is from the old one"),
    MetricInfo("diffusion/max_abs_d", "nats, scaled by length_norm", "max", "the largest of these differences"),
    MetricInfo("diffusion/clip_fraction", "share of differences", "mean", "those whose gradient a clip takes away"),
    MetricInfo("diffusion/kl", "nats, scaled by length_norm", "mean", "penalised divergence from a reference"),
    *(
        MetricInfo(f"diffusion/masked_{low}_to_{low + 25}", "share of samples", "mean", "hiding so many % of tokens")
        for low in (0, 25, 50, 75)
    ),
    MetricInfo("diffusion/rows_kept", "rows", "sum", "rows that count in the loss, on all ranks"),
    MetricInfo("diffusion/rows_skipped", "rows", "sum", "rows without advantage, which do not"),
    MetricInfo("diffusion/scored_tokens", "tokens", "sum", "completion tokens of rows that count"),
    MetricInfo("diffusion/flat_tokens", "tokens", "sum", "of rows that ran, in all samples, where prompts are shared"),
    MetricInfo("diffusion/tree_tokens", "tokens", "sum", "of those, what was computed: what rows share counted once"),
    MetricInfo("diffusion/peak_memory_gib", "GiB", "max", "most memory of a GPU in use so far"),
    MetricInfo("diffusion/model_calls", "calls", "mean", "of a sampled batch, where the trainer samples itself"),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


def reduction_of(name: str) -> Reduction:
    """How values of several micro-batches or ranks become one. Raises KeyError for a name that is not in the table."""
    return _BY_NAME[name].reduction


def markdown() -> str:
    """The table for the docs."""
    rows = [f"| `{metric.name}` | {metric.unit} | {metric.reduction} | {metric.meaning} |" for metric in METRICS]
    return "\n".join(["| metric | unit | over micro-batches or ranks | |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(markdown())
