"""Forward and backward of one policy update on a group that shares an image: the tree against stock TRL.

    OMP_NUM_THREADS=1 python -m benchmarks.images            # about two minutes on one CPU core
    OMP_NUM_THREADS=1 python -m benchmarks.images --family qwen3_vl --rounds 3
    OMP_NUM_THREADS=1 python -m benchmarks.images --smoke    # seconds

Every family has two rows. The first is a group of 8 with one image of 448 x 448, a question of 64 tokens and answers of
100, its vision tower trained: stock TRL's own log-prob hook, a dense path with the LM head on completions only, and the
tree, for which the tower runs once. The second is text alone, as many tokens: the tree of the vision-language class
against that of the language model's own class, which has the same weights and no tower.

The ceiling is the largest possible speed-up over a dense path that wastes nothing: of the language model linear layers
on tokens, attention on visible pairs and the LM head on scored tokens (dta_plugin/tree/cost.py), of the tower what
torch counts as it runs (matrices on patches, attention on pairs). `% of ceiling` is taken against the lean dense path:
on CPUs, TRL's hook runs the LM head over prompts, too, and once more in the backward pass.

Log-probs, entropies, losses and gradients of all contenders are compared in the same run; it fails if they differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.common.backward import gradient_error
from benchmarks.common.harness import arguments, header, interleaved, median_ratio, parsed, table, write_json
from benchmarks.common.models import MODEL_KEYS, twin
from benchmarks.common.stock import prepare_for_trl, trl
from benchmarks.common.updates import Outcome, Step, dense, tree
from benchmarks.common.workloads import Workload, star
from benchmarks.images import models
from dta_plugin import PrefixTree
from dta_plugin.models.introspection import model_cost
from dta_plugin.tree.cost import estimate

TOLERANCE = 1e-4
NAMES = {"trl": "TRL", "dense": "lean dense", "text_class": "text class, tree", "tree": "ours"}
TOWER_KEYS = ("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size")
Image = dict[str, torch.Tensor]


def main() -> None:
    args = _arguments()
    rows: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        **header("images", args),
        "models": {},
        "rows": rows,
    }
    pixels, question, answer, group = (64, 8, 6, 3) if args.smoke else (448, 64, 100, 8)
    for family in args.family:
        model = models.random_model(models.FAMILIES[family](args.smoke))
        text, tower = model.config.text_config, model.config.vision_config
        content["models"][family] = {k: getattr(text, k, None) for k in MODEL_KEYS} | {
            "tower": {k: getattr(tower, k) for k in TOWER_KEYS}
        }
        work, image = with_image(model, pixels, question, answer, group)
        rows.append({"family": family, "name": f"image {pixels} x {pixels}"} | _image_row(model, work, image, args))
        print(_summary(rows[-1]), flush=True)
        rows.append({"family": family, "name": "text alone"} | _text_row(model, work, args))
        print(_summary(rows[-1]), flush=True)
        if args.output:
            write_json(args.output, content)
    print(f"\n{result_table(rows)}")
    if bad := [f"{row['family']}, {row['name']}" for row in rows if not max(row["error"].values()) <= TOLERANCE]:
        sys.exit(f"Contenders disagree by more than rounding explains on {'; '.join(bad)}: see the error column.")


def _arguments() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--family", nargs="+", choices=tuple(models.FAMILIES), default=list(models.FAMILIES))
    return parsed(parser)


def with_image(model: PreTrainedModel, pixels: int, question: int, answer: int, group: int) -> tuple[Workload, Image]:
    """One group whose prompt is an image of `pixels` x `pixels` and a question; what a processor returns for it."""
    vision = model.config.vision_config
    side = pixels // vision.patch_size
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    values = torch.randn(side**2, size, generator=torch.Generator().manual_seed(2))
    image = {"pixel_values": values, "image_grid_thw": torch.tensor([[1, side, side]])}
    tokens = side**2 // vision.spatial_merge_size**2
    placeholders = [models.VISION_START, *[models.IMAGE_TOKEN] * tokens, models.VISION_END]
    text = star(question, answer, group, model.config.text_config.vocab_size - models.FIRST_TEXT)
    sequences = [torch.cat([torch.tensor(placeholders), row + models.FIRST_TEXT]) for row in text.sequences]
    prompt = len(placeholders) + question
    return Workload(text.name, sequences, [prompt] * group, text.advantages, is_group=True), image


def _image_row(model: PreTrainedModel, work: Workload, image: Image, args: argparse.Namespace) -> dict[str, Any]:
    group = len(work.sequences)
    is_image = torch.stack([sequence == models.IMAGE_TOKEN for sequence in work.sequences])
    inputs = {name: torch.cat([value] * group) for name, value in image.items()}
    inputs["mm_token_type_ids"] = is_image.long()
    contenders = {name: twin(model) for name in ("trl", "dense", "tree")}
    prepare_for_trl(contenders["trl"])
    steps = {
        "trl": trl(contenders["trl"], work, inputs | {"num_images": [1] * group}),
        "dense": dense(contenders["dense"], work, inputs),
        "tree": tree(contenders["tree"], work, images=[dict(image) for _ in range(group)]),
    }
    return _measured(model, work, contenders, steps, args) | _ceiling(model, work, image)


def _text_row(model: PreTrainedModel, work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """As many tokens as with an image, all text."""
    vocabulary = model.config.text_config.vocab_size - models.FIRST_TEXT
    text = star(work.prompt_lengths[0], work.completion_lengths[0], len(work.sequences), vocabulary)
    text.sequences[:] = [row + models.FIRST_TEXT for row in text.sequences]
    contenders = {"text_class": models.text_model(model), "tree": twin(model)}
    steps = {name: tree(contender, text) for name, contender in contenders.items()}
    return _measured(model, text, contenders, steps, args) | {"ceiling": None, "tower_share": None}


def _ceiling(model: PreTrainedModel, work: Workload, image: Image) -> dict[str, float]:
    """Of the speed-up over lean dense, and the tower's share of the dense path's FLOPs."""
    scored = sum(work.completion_lengths)
    language = estimate(PrefixTree.from_sequences(work.sequences), model_cost(model), scored, scored)
    tower = models.tower_flops(model, image)
    whole = language.dense + tower * len(work.sequences)
    return {
        "ceiling": whole / (language.tree + tower),
        "tower_share": tower * len(work.sequences) / whole,
        "tower_flops": tower,
    }


def _measured(
    model: PreTrainedModel,
    work: Workload,
    contenders: dict[str, PreTrainedModel],
    steps: dict[str, Step],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Times and differences of the contenders, all of which have the parameters of `model`."""
    outcomes: dict[str, Outcome] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}

    def keep(index: int, name: str, outcome: Outcome) -> None:
        if index == 0:
            outcomes[name] = outcome
            found = {models.text_name(key): p.grad for key, p in contenders[name].named_parameters()}
            gradients[name] = {key: gradient.clone() for key, gradient in found.items() if gradient is not None}

    clocks = interleaved(steps, args.rounds + 1, lambda: model.zero_grad(set_to_none=True), keep, torch.device("cpu"))
    clocks = {clock: {name: values[1:] for name, values in by_name.items()} for clock, by_name in clocks.items()}
    seconds = clocks[args.clock]
    flat, shared = sum(map(len, work.sequences)), PrefixTree.from_sequences(work.sequences)
    first = next(iter(steps))
    return {
        "sequences": len(work.sequences),
        "flat_tokens": flat,
        "tree_tokens": shared.tree_tokens,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "speed_up_over": {name: median_ratio(seconds[name], seconds["tree"]) for name in seconds if name != "tree"},
        "error": {
            name: max(
                gradient_error(gradients[name], gradients[first]),
                *(_difference(outcomes[name], outcomes[first], field) for field in ("loss", "logprobs", "entropies")),
            )
            for name in steps.keys() - {first}
        },
        "seconds": clocks,
    }


def _difference(actual: Outcome, expected: Outcome, field: str) -> float:
    one, other = getattr(actual, field), getattr(expected, field)
    return float((one - other).norm() / other.norm().clamp(min=1.0))


def _summary(row: dict[str, Any]) -> str:
    times = ", ".join(f"{NAMES[name]} {value:.0f} ms" for name, value in row["milliseconds"].items())
    return f"{row['family']}, {row['name']}: {times}"


def result_table(rows: list[dict[str, Any]]) -> str:
    """One line per row."""

    def times(row: dict[str, Any], name: str) -> str:
        return f"{row['speed_up_over'][name]:.2f}x" if name in row["speed_up_over"] else "-"

    def of_ceiling(row: dict[str, Any]) -> str:
        return "-" if row["ceiling"] is None else f"{row['speed_up_over']['dense'] / row['ceiling']:.0%}"

    header = [
        "model",
        "row",
        "tokens flat -> tree",
        "tower, of dense FLOPs",
        "ceiling",
        *(f"{title} ms" for title in NAMES.values()),
        *(f"ours vs {NAMES[name]}" for name in NAMES if name != "tree"),
        "% of ceiling",
        "max error",
    ]
    body = [
        [
            row["family"],
            row["name"],
            f"{row['flat_tokens']} -> {row['tree_tokens']}",
            "-" if row["tower_share"] is None else f"{row['tower_share']:.0%}",
            "-" if row["ceiling"] is None else f"{row['ceiling']:.2f}x",
            *(f"{row['milliseconds'][name]:.0f}" if name in row["milliseconds"] else "-" for name in NAMES),
            *(times(row, name) for name in NAMES if name != "tree"),
            of_ceiling(row),
            f"{max(row['error'].values()):.0e}",
        ]
        for row in rows
    ]
    return table(header, body)


if __name__ == "__main__":
    main()
