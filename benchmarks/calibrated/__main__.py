"""Does a calibration keep its promises? Predicted against measured step times, and the gate against stock TRL.

    python -m benchmarks.calibrated                      # about 10 minutes on one CPU core
    python -m benchmarks.calibrated --plot predicted.png # needs matplotlib (the `plot` extra)
    python -m benchmarks.calibrated --smoke              # seconds: tiny model, few batches, checks the benchmark itself

Predictions: a small Qwen3 is calibrated (as `dta calibrate` does), then 30 other batches run forward and backward, as a
tree and through TRL's own log-prob method; measured times against those that the calibration predicts.

Gate: 40 batches from no sharing to stars of 32 go through the TRL adapter, which decides by the calibration and may run
TRL's own path, and through stock TRL, in turn, on the same padded rows. The ratio is the median over rounds; making the
tree, the decision and the backward pass are in it. `--small` takes a model so small that what a tree costs besides the
model counts.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrated.report import checks, draw, gate_table, prediction_table
from benchmarks.calibrated.workloads import graded, varied
from benchmarks.common.harness import CLOCKS, environment, interleaved, median_ratio, write_json
from benchmarks.common.models import MODEL_KEYS, qwen3, random_model
from dta_plugin import PrefixTree, TreeConfig
from dta_plugin.adapters.trl.dense import DenseScorer
from dta_plugin.adapters.trl.scoring import tree_log_probs
from dta_plugin.adapters.trl.state import TreeState
from dta_plugin.calibrate import Bench, Case, DenseBatch, calibrate
from dta_plugin.training.notices import Notices

CPU = torch.device("cpu")
# Short batches run until this time is up, or so often.
_LEAST_SECONDS, _MOST_ROUNDS = 2.0, 25
# Layers, hidden size, vocabulary.
MODEL, SMALL_MODEL = (4, 256, 8192), (2, 64, 512)


def main() -> None:
    args = _arguments()
    gc.freeze()
    torch.set_num_threads(1)
    where = environment(CPU)
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(SMALL_MODEL if args.small else MODEL, args, Path(folder))
        predicted = [subject.predict(case) for case in varied(subject.vocab, args.batches, args.scale)]
        graded_cases = list(graded(subject.vocab, args.scale))[:: 8 if args.smoke else 1]
        gated = [subject.gate(case) for case in graded_cases]
    found = checks(predicted, gated, args.clock)
    print(f"\n{prediction_table(predicted)}\n\n{gate_table(gated, args.clock)}\n")
    print("\n".join(f"{check['name']}: {check['found']:.3f} (allowed {check['allowed']:.2f})" for check in found))
    if args.plot:
        draw(predicted, args.plot)
    if args.output:
        content = {
            "benchmark": "calibrated",
            "smoke": args.smoke,
            "clock": args.clock,
            "rounds": args.rounds,
            **where,
            "model": subject.described,
            "calibration": asdict(subject.calibration),
            "predicted": predicted,
            "gated": gated,
            "checks": found,
        }
        write_json(args.output, content)
    if not args.smoke and any(check["found"] > check["allowed"] for check in found):
        sys.exit("A promise does not hold: see above.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny model and batches, a few of each")
    parser.add_argument("--small", action="store_true", help="a model of hidden size 64")
    parser.add_argument("--batches", type=int, default=30, help="batches to predict (30)")
    parser.add_argument("--rounds", type=int, default=3, help="at least (3); short batches run more often")
    parser.add_argument("--seconds", type=float, default=60.0, help="of calibration per model (60)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="the clock of calibration and figures")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--plot", type=Path, help="PNG file for the plot")
    args = parser.parse_args()
    args.scale = 0.1 if args.smoke else 1.0
    if args.smoke:
        args.small, args.batches, args.rounds, args.seconds = True, 5, 1, 1.0
    return args


class Subject:
    """One calibrated model, with stock TRL's scoring and the adapter's on top of it."""

    def __init__(self, size: tuple[int, int, int], args: argparse.Namespace, folder: Path) -> None:
        config = qwen3(*size)
        self.rounds, self.clock, self.vocab = args.rounds, args.clock, config.vocab_size
        self.described = {key: getattr(config, key) for key in MODEL_KEYS}
        self.model = random_model(config)
        self.trainer = DenseScorer(self.model)
        self.calibration, _ = calibrate(
            self.model,
            seconds=args.seconds,
            dense=self.trainer,
            dense_path="trl",
            return_entropy=True,
            clock=CLOCKS[args.clock],
            progress=print,
        )
        print(f"hidden size {size[1]}: within {self.calibration.error:.0%} on its own batches", flush=True)
        file = self.calibration.save(folder / f"{size[1]}.json")
        self.state = TreeState(TreeConfig(calibration=str(file)), Notices(speaks=False))
        # What the hook reads of a trainer beyond what scoring needs.
        self.trainer.args, self.trainer._buffered_inputs, self.trainer._step = None, None, 0
        self.trainer._metrics = defaultdict(lambda: defaultdict(list))

    def predict(self, case: Case) -> dict[str, Any]:
        """Measured and predicted seconds of both ways."""
        bench = Bench(self.model, case, self.trainer, return_entropy=True, clock=CLOCKS[self.clock])
        bench.run()
        for _ in range(self._rounds(sum(bench.run()))):
            bench.run()
        tree, dense = (statistics.median(times[1:]) for times in zip(*bench.taken, strict=True))
        sample = bench.sample()
        print(f"{case.name}: tree {tree:.3f} s, dense {dense:.3f} s", flush=True)
        speeds = self.calibration
        return {
            "name": case.name,
            "tree": {"measured": tree, "predicted": speeds.tree.seconds(sample.tree_work)},
            "dense": {"measured": dense, "predicted": speeds.dense.seconds(sample.dense_work)},
        }

    def gate(self, case: Case) -> dict[str, Any]:
        """Stock TRL and the adapter in turn."""
        rows = DenseBatch.from_case(case, CPU)
        ran: list[float] = []

        def stock() -> None:
            self._backward(rows, self.trainer(self.model, rows))

        def adapter() -> None:
            own = self.trainer._get_per_token_logps_and_entropies
            arguments = (self.model, rows.input_ids, rows.attention_mask, rows.columns)
            values = tree_log_probs(self.trainer, self.state, own, *arguments, compute_entropy=True)
            self._backward(rows, values[0])

        def before() -> None:
            self.model.zero_grad(set_to_none=True)

        def after(index: int, name: str, result: None) -> None:
            if name == "adapter":
                ran.append(self.trainer._metrics["train"]["dta/dense_fallback"][-1])

        stock(), adapter()
        start = time.perf_counter()
        stock(), adapter()
        rounds = self._rounds(time.perf_counter() - start)
        seconds = interleaved({"stock": stock, "adapter": adapter}, rounds, before, after, CPU)
        ratios = {clock: median_ratio(found["adapter"], found["stock"]) for clock, found in seconds.items()}
        print(f"{case.name}: {ratios[self.clock]:.3f} of stock's time", flush=True)
        tree = PrefixTree.from_sequences(case.sequences)
        return {
            "name": case.name,
            "hidden_size": self.described["hidden_size"],
            "flat_tokens": tree.flat_tokens,
            "tree_tokens": tree.tree_tokens,
            "ran": "dense" if ran[-1] else "tree",
            "stock_ms": 1e3 * statistics.median(seconds[self.clock]["stock"]),
            "ratio": ratios,
        }

    def _rounds(self, seconds: float) -> int:
        """More of them where one is short, and medians would be of noise."""
        return max(self.rounds, min(_MOST_ROUNDS, round(_LEAST_SECONDS / seconds)))

    def _backward(self, rows: DenseBatch, logprobs: torch.Tensor) -> None:
        scored = rows.attention_mask[:, -rows.columns :].bool()
        logprobs[scored].sum().backward()


if __name__ == "__main__":
    main()
