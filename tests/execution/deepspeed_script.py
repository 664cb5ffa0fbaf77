"""Run by test_deepspeed.py on two ranks: training under DeepSpeed ZeRO, stock and through the package.

python -m tests.execution.deepspeed_script <folder> <stage>
"""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from torch import distributed

from dta_plugin import InvalidInputError, TreeConfig, sequence_logprobs
from dta_plugin.execution.dense import dense_logprobs
from tests.support.models import tiny_model
from tests.support.trees import Sequences, branching_comb, run, star

# Per rank, the batches of two micro-steps: different numbers of chunks on the ranks.
BATCHES = [[branching_comb(4), star(6, prefix=9, branch=4)], [star(9, prefix=4), branching_comb(7)]]
PACKED, STREAMED = TreeConfig(executor="packed"), TreeConfig(executor="streamed", max_tree_tokens_per_chunk=8)


def start(stage: int, accumulate: int = 1) -> Any:
    model = tiny_model("llama").train()
    # Small buckets, so that what arrives in another order on another rank meets the wrong gradients.
    zero = {"stage": stage, "reduce_bucket_size": 3000}
    if stage == 3:  # nothing of a tiny model stays whole
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def trained(stage: int, config: TreeConfig | None, accumulate: int) -> dict[str, torch.Tensor]:
    """Weights after two optimizer steps; config None: stock."""
    engine = start(stage, accumulate)
    for micro_step in range(2 * accumulate):
        sequences = BATCHES[distributed.get_rank()][micro_step % 2]
        engine.backward(-torch.cat(logprobs(engine, sequences, config)).mean())
        engine.step()
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def logprobs(engine: Any, sequences: Sequences, config: TreeConfig | None) -> list[torch.Tensor]:
    if config is None:
        return dense_logprobs(engine, [torch.tensor(sequence) for sequence in sequences])[0]
    return sequence_logprobs(engine, sequences, config).logprobs


def zero3() -> dict[str, str]:
    """Who runs under ZeRO-3, and what streaming says."""
    engine, sequences = start(3), [run(9), [*run(5), 7]]
    found = {"auto": sequence_logprobs(engine, sequences).report.executor}
    found["above the budget"] = sequence_logprobs(
        engine, sequences, TreeConfig(max_tree_tokens_per_chunk=4)
    ).report.reason
    try:
        sequence_logprobs(engine, sequences, STREAMED)
    except InvalidInputError as error:
        found["streamed"] = str(error)
    return found


def main(folder: str, stage: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes most of a minute; gloo serves
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60), verbose=False)
    rank = distributed.get_rank()
    configs = {"stock": None, "packed": PACKED, "streamed": STREAMED, "mixed": STREAMED if rank else PACKED}
    result: Any = (
        zero3()
        if stage == "3"
        else {
            (name, accumulate): trained(int(stage), config, accumulate)
            for name, config in configs.items()
            for accumulate in (1, 2)
        }
    )
    torch.save(result, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    os._exit(0)  # DeepSpeed's threads now and then abort an orderly exit


if __name__ == "__main__":
    main(*sys.argv[1:])
