"""Memory and time of a diffusion-LM update against the number of ELBO samples: BGPO's loop, and one graph of all.

    python -m benchmarks.diffusion.memory            # about 5 minutes on one CPU core
    python -m benchmarks.diffusion.memory --smoke    # seconds: a tiny model, checks the benchmark itself

One row is one policy update (forward, loss, backward) of a small bidirectional Qwen3 on 8 completions. `loop` is BGPO's
bound, back-propagated sample by sample. `one graph` is the objective that it bounds, exp(mean ELBO difference) times
advantage, as VRPO-online optimises it: its gradient needs all samples at once. On-policy both have the same gradient,
which is compared in the same run.

Saved: the largest number of bytes that autograd holds at a time for the backward pass, parameters aside; on CUDA also
what the device held. Times are medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.common.backward import SavedBytes, gradient_error
from benchmarks.common.harness import CLOCKS, environment, interleaved, table, write_json
from benchmarks.common.models import MODEL_KEYS, qwen3, random_model
from dta_plugin.diffusion import DiffusionFamily, MaskDraws, bidirectional, draw_masks, family_of
from dta_plugin.diffusion.objectives.baselines import sampled_elbo_ratio
from dta_plugin.diffusion.objectives.bgpo import per_sample_losses
from dta_plugin.diffusion.objectives.elbo import length_scale, sample_term

SAMPLES = (1, 2, 4, 8, 16, 32)
# Largest relative difference of a gradient that rounding explains.
TOLERANCE = 1e-4
Step = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """input_ids: int64 [B, P + C]. lengths: int64 [B], all C. advantages: [B]."""

    model: PreTrainedModel
    family: DiffusionFamily
    input_ids: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, rows: int, prompt: int, completion: int, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(4, model.config.vocab_size, (rows, prompt + completion), generator=generator)
        advantages = torch.linspace(-1.0, 1.0, rows)
        return cls(
            model,
            family_of(model.config),
            ids.to(device),
            torch.full((rows,), completion),
            advantages.to(device),
        )

    def draws(self, samples: int) -> MaskDraws:
        return draw_masks(self.lengths, samples, torch.arange(len(self.lengths)))

    def term(self, draws: MaskDraws, sample: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        length = int(self.lengths[0])
        return sample_term(self.model, self.family, self.input_ids, None, draws, sample, length, rows)

    @property
    def scale(self) -> torch.Tensor:
        return length_scale("length", self.lengths, int(self.lengths[0])).to(self.advantages.device)


def loop(batch: Batch, samples: int) -> Step:
    def step() -> None:
        draws = batch.draws(samples)
        losses = per_sample_losses(
            lambda sample, rows: batch.term(draws, sample, rows), batch.advantages, samples, length_scale=batch.scale
        )
        for part in losses:
            part.loss.backward()

    return step


def one_graph(batch: Batch, samples: int) -> Step:
    def step() -> None:
        draws = batch.draws(samples)
        terms = torch.stack([batch.term(draws, sample) for sample in range(samples)], dim=1)
        d = (terms - terms.detach()) * batch.scale[:, None]
        (-sampled_elbo_ratio(d, batch.advantages).mean()).backward()

    return step


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = qwen3(layers=2, hidden=64, vocab=512) if args.smoke else qwen3()
    model = random_model(bidirectional(config, mask_token_id=3)).to(device)
    shape = (4, 8, 16) if args.smoke else (8, 64, 192)
    batch = Batch.of(model, *shape, device)
    rows = []
    for samples in SAMPLES[:3] if args.smoke else SAMPLES:
        rows.append(_measure(batch, samples, args.rounds, args.clock, device))
        print(f"{samples} samples: {_cells(rows[-1], rows[0])}", flush=True)
    print(f"\n{_table(rows)}")
    if args.output:
        content = {
            "benchmark": "diffusion_memory",
            "smoke": args.smoke,
            "device": args.device,
            "clock": args.clock,
            "rounds": args.rounds,
            "rows_prompt_completion": shape,
            "model": {key: getattr(config, key) for key in MODEL_KEYS},
            **environment(device),
            "rows": rows,
        }
        write_json(args.output, content)
    if bad := [row["samples"] for row in rows if not row["error"] <= TOLERANCE]:
        sys.exit(f"Gradients differ by more than {TOLERANCE:.0e} with {bad} samples: see the error column.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny model and shapes, 1 round, up to 4 samples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="the clock that the table shows")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.smoke:
        args.rounds = 1
    return args


def _measure(batch: Batch, samples: int, rounds: int, clock: str, device: torch.device) -> dict[str, Any]:
    """Memory of one run of both ways, their gradients compared, then their times."""
    steps = {"loop": loop(batch, samples), "one_graph": one_graph(batch, samples)}
    examined = {name: _examined(batch.model, step, device) for name, step in steps.items()}

    def clear() -> None:
        batch.model.zero_grad(set_to_none=True)

    clocks = interleaved(steps, rounds, clear, lambda *_: None, device)
    clear()
    return {
        "samples": samples,
        "saved_bytes": {name: saved for name, (saved, _, _) in examined.items()},
        "device_bytes": {name: held for name, (_, held, _) in examined.items()},
        "error": gradient_error(examined["loop"][2], examined["one_graph"][2]),
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in clocks[clock].items()},
        "seconds": clocks,
    }


def _examined(
    model: PreTrainedModel, step: Step, device: torch.device
) -> tuple[int, int | None, dict[str, torch.Tensor]]:
    """Peak of saved bytes, what a CUDA device held beyond what it held before, and the gradients."""
    model.zero_grad(set_to_none=True)
    saved, held = SavedBytes(model), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        step()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return saved.peak, torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None, gradients


def _cells(row: dict[str, Any], first: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {row['saved_bytes'][name] / 1e6:.1f} MB "
        f"({row['saved_bytes'][name] / first['saved_bytes'][name]:.2f}x), {row['milliseconds'][name]:.0f} ms"
        for name in ("loop", "one_graph")
    )


def _table(rows: list[dict[str, Any]]) -> str:
    header = ("samples", "loop MB", "one graph MB", "loop ms", "one graph ms", "ms per sample, loop", "max error")
    body = [
        (
            str(row["samples"]),
            f"{row['saved_bytes']['loop'] / 1e6:.1f}",
            f"{row['saved_bytes']['one_graph'] / 1e6:.1f}",
            f"{row['milliseconds']['loop']:.0f}",
            f"{row['milliseconds']['one_graph']:.0f}",
            f"{row['milliseconds']['loop'] / row['samples']:.0f}",
            f"{row['error']:.0e}",
        )
        for row in rows
    ]
    return table(header, body)


if __name__ == "__main__":
    main()
