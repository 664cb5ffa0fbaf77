"""Sampling from a diffusion LM: caches of keys and values, and a confidence threshold, against every column every call.

    python -m benchmarks.diffusion.sampling            # about 15 minutes on one CPU core
    python -m benchmarks.diffusion.sampling --smoke    # seconds: a tiny model, checks the benchmark itself

Two small Qwen3 learn to write a random language, one with full attention (as LLaDA), one whose attention is causal over
blocks (as SDAR): after every token only FOLLOWERS others may come, with the probabilities of CHANCES. So a completion
can be judged: `legal` is the share of its tokens that may follow the one before. Then each samples completions in
several ways, interleaved, from the same seeds at temperature 1.

`differ` is the share of tokens that are not those of `none`, the sampler without a cache, at the same noise; in float32
rounding may turn a choice between two tokens. Where attention is causal over blocks a cache has to give the same
samples in float64, with and without a threshold, or the benchmark fails. A threshold reads other random numbers than a
fixed number of calls, so that tokens of the two cannot be compared. Speed-ups are medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from benchmarks.common.harness import CLOCKS, environment, interleaved, median_ratio, table, write_json
from benchmarks.common.models import MODEL_KEYS, qwen3
from dta_plugin.diffusion import DiffusionFamily, SampledCompletions, SamplerConfig, bidirectional, family_of, sample
from dta_plugin.diffusion.objectives.elbo import masked_log_probs

VOCABULARY, MASK = 64, 0  # the other tokens are words
CHANCES = (0.97, 0.01, 0.01, 0.01)
FOLLOWERS = len(CHANCES)
BLOCK = 32
SHAPES = ("64x64", "64x256", "512x64", "512x256")  # prompt x canvas
THRESHOLD = 0.9
# Per attention: how it samples, beside `none`.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "none": {"kv_cache": "none"},
        "prefix": {"kv_cache": "prefix"},
        "dual": {"kv_cache": "dual"},
        "threshold": {"kv_cache": "none", "confidence_threshold": THRESHOLD},
        "threshold, dual": {"kv_cache": "dual", "confidence_threshold": THRESHOLD},
    },
    "blocks": {
        "none": {"kv_cache": "none"},
        "prefix": {"kv_cache": "prefix"},
        "threshold": {"kv_cache": "none", "confidence_threshold": THRESHOLD},
        "threshold, prefix": {"kv_cache": "prefix", "confidence_threshold": THRESHOLD},
    },
}


class Language:
    """Which words may follow which, and texts of it."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        words = torch.rand(VOCABULARY, VOCABULARY - 1, generator=self.generator).argsort(dim=1) + 1
        self.followers = words[:, :FOLLOWERS]  # [V, FOLLOWERS]

    def texts(self, rows: int, length: int) -> torch.Tensor:
        """int64 [rows, length]."""
        chosen = torch.multinomial(torch.tensor(CHANCES), rows * length, True, generator=self.generator)
        text = torch.randint(1, VOCABULARY, (rows, 1), generator=self.generator)
        for choice in chosen.view(length, rows)[1:]:
            text = torch.cat([text, self.followers[text[:, -1], choice][:, None]], dim=1)
        return text

    def legal(self, prompts: torch.Tensor, completions: torch.Tensor) -> float:
        """The share of completions' tokens that may follow the token before."""
        before = torch.cat([prompts[:, -1:], completions[:, :-1]], dim=1)
        return float((self.followers[before] == completions[..., None]).any(dim=-1).double().mean())


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    config = qwen3(layers=2, hidden=64, vocab=VOCABULARY) if args.smoke else qwen3(2, 128, VOCABULARY)
    language, rows = Language(), []
    for attention, ways in WAYS.items():
        block = BLOCK if attention == "blocks" else None
        model = _taught(config, block, language, args.teaching)
        family = family_of(model.config)
        for shape in args.shapes:
            prompt, canvas = map(int, shape.split("x"))
            prompts = language.texts(args.rows, prompt)
            rows += _measure(model, family, attention, ways, prompts, canvas, language, args)
    print(f"\n{sampling_table(rows)}")
    if args.output:
        content = {
            "benchmark": "diffusion_sampling",
            "smoke": args.smoke,
            "clock": args.clock,
            "rounds": args.rounds,
            "batch": args.rows,
            "teaching_steps": args.teaching,
            "model": {key: getattr(config, key) for key in MODEL_KEYS},
            **environment(torch.device("cpu")),
            "rows": rows,
        }
        write_json(args.output, content)
    if not all(row["same_in_float64"] for row in rows if row["same_in_float64"] is not None):
        sys.exit("A cache changed samples though attention is causal over blocks: see same_in_float64 in the results.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny model and shapes, 1 round, 2 steps of teaching")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens of prompt x canvas, which 32 divides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2, help="completions at a time")
    parser.add_argument("--teaching", type=int, default=300, help="training steps of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="cpu", help="the clock that the table shows")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.teaching, args.rows, args.shapes = 1, 2, 2, ["8x64"]
    return args


def _taught(config: Any, block: int | None, language: Language, steps: int) -> PreTrainedModel:
    """A model trained as a masked diffusion LM, on texts of four blocks of which a random share is hidden."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(bidirectional(config, mask_token_id=MASK, block_length=block))
    family, optimizer = family_of(model.config), torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    model.train()
    for _ in range(steps):
        text = language.texts(16, 3 * BLOCK)
        share = torch.rand(len(text), 1).clamp(min=0.1)
        hidden = torch.rand(text.shape) < share
        if block is not None:  # the last block is written, those before are known
            hidden[:, :-BLOCK] = False
        found = masked_log_probs(model, family, text, None, hidden)
        (-(found / share).sum() / hidden.sum().clamp(min=1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def _same_in_float64(
    model: PreTrainedModel, family: DiffusionFamily, prompts: torch.Tensor, canvas: int, options: dict[str, Any]
) -> bool:
    """Whether a cache gives the samples and the steps of none."""
    exact = copy.deepcopy(model).double()
    base = SamplerConfig(gen_length=canvas, block_length=BLOCK, temperature=1.0)
    both = [
        sample(exact, family, prompts, None, replace(base, **given), torch.Generator().manual_seed(0))
        for given in (options, options | {"kv_cache": "none"})
    ]
    return torch.equal(both[0].completion_ids, both[1].completion_ids) and torch.equal(both[0].steps, both[1].steps)


def _measure(
    model: PreTrainedModel,
    family: DiffusionFamily,
    attention: str,
    ways: dict[str, dict[str, Any]],
    prompts: torch.Tensor,
    canvas: int,
    language: Language,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    base = SamplerConfig(gen_length=canvas, block_length=BLOCK, temperature=1.0)
    found: dict[str, list[SampledCompletions]] = {name: [] for name in ways}
    rounds = iter(range(args.rounds * len(ways)))

    def way(options: dict[str, Any]) -> Any:
        def run() -> SampledCompletions:
            seed = next(rounds) // len(ways)  # a round's ways share theirs
            return sample(model, family, prompts, None, replace(base, **options), torch.Generator().manual_seed(seed))

        return run

    contenders = {name: way(options) for name, options in ways.items()}
    clocks = interleaved(
        contenders, args.rounds, lambda: None, lambda _, name, one: found[name].append(one), torch.device("cpu")
    )
    seconds = clocks[args.clock]
    rows = []
    for name, options in ways.items():
        tokens = torch.stack([one.completion_ids for one in found[name]])
        reference = torch.stack([one.completion_ids for one in found["none"]])
        differ = None if "confidence_threshold" in options else float((tokens != reference).double().mean())
        rows.append(
            {
                "attention": attention,
                "prompt": prompts.shape[1],
                "canvas": canvas,
                "way": name,
                "model_calls": statistics.fmean(one.model_calls for one in found[name]),
                "tokens_per_second": tokens[0].numel() / statistics.median(seconds[name]),
                "speed_up": median_ratio(seconds["none"], seconds[name]),
                "differ": differ,
                "same_in_float64": _same_in_float64(model, family, prompts, canvas, options)
                if attention == "blocks" and options["kv_cache"] != "none"
                else None,
                "legal": statistics.fmean(language.legal(prompts, one) for one in tokens),
                "seconds": {clock: values[name] for clock, values in clocks.items()},
            }
        )
        print(" ".join(_cells(rows[-1])), flush=True)
    return rows


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["attention"],
        str(row["prompt"]),
        str(row["canvas"]),
        row["way"],
        f"{row['model_calls']:.0f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['speed_up']:.2f}",
        "-" if row["differ"] is None else f"{row['differ']:.3f}",
        f"{row['legal']:.3f}",
    )


def sampling_table(rows: list[dict[str, Any]]) -> str:
    header = ("attention", "prompt", "canvas", "sampler", "model calls", "tokens/s", "speed-up", "differ", "legal")
    return table(header, [_cells(row) for row in rows])


if __name__ == "__main__":
    main()
