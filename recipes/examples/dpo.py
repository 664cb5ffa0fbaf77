# %% [markdown]
# DPO, on a CPU in under two minutes: several pairs of answers to the same prompts, which policy and reference compute
# once each. The cells run as a script (`python recipes/examples/dpo.py`, from the repository's root) or in a notebook.

# %% A model, a tokenizer and prompts, built here; yours is any name or folder that `from_pretrained` takes.
import random
import subprocess
import sys

from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer

import dta_plugin

FOLDER = "runs/examples"
subprocess.run([sys.executable, "recipes/quickstart/build.py", "--output", FOLDER], check=True)

# %% Preferences: of two guesses, the right one. Four pairs for every prompt.
random.seed(0)
prompts = load_dataset("json", data_files=f"{FOLDER}/data/train.jsonl", split="train").select(range(64))
pairs = [
    {"prompt": row["prompt"], "chosen": f" guess {row['answer']}", "rejected": f" guess {wrong}"}
    for row in prompts
    for wrong in random.sample([hour for hour in range(9) if hour != row["answer"]], 4)
]

# %% The one line that is not TRL's: batches are made of siblings, and what they share is computed once.
dta_plugin.enable()

# %% An ordinary TRL trainer.
trainer = DPOTrainer(
    model=f"{FOLDER}/model",
    args=DPOConfig(
        output_dir=f"{FOLDER}/dpo",
        per_device_train_batch_size=8,
        learning_rate=2e-4,
        num_train_epochs=1,
        logging_steps=8,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    ),
    train_dataset=Dataset.from_list(pairs),
)
trainer.train()

# %% What was learnt, and what was shared.
log = [entry for entry in trainer.state.log_history if "rewards/accuracies" in entry]
print(f"right answer preferred {log[0]['rewards/accuracies']:.2f} -> {log[-1]['rewards/accuracies']:.2f}")
print(f"every computed token was used {log[-1]['dta/compression_ratio']:.1f} times")
