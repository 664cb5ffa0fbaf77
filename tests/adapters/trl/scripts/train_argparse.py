"""The same script with plain argparse and hard-coded training options; it imports from the folder it lies in.

python train_argparse.py --model MODEL --data FILE.jsonl --result FILE.pt --output FOLDER
"""

from __future__ import annotations

import argparse

from train import Arguments, run
from trl import GRPOConfig

parser = argparse.ArgumentParser()
for name in ("model", "data", "result", "output"):
    parser.add_argument(f"--{name}", required=True)
parsed = parser.parse_args()
run(
    Arguments(parsed.model, parsed.data, parsed.result),
    GRPOConfig(
        output_dir=parsed.output,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=9,
        max_steps=3,
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=11,
    ),
)
