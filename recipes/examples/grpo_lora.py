# %% [markdown]
# GRPO with LoRA, on a CPU in under two minutes: a tiny model learns to work out hours on a clock instead of guessing.
# The cells run as a script (`python recipes/examples/grpo_lora.py`, from the repository's root) or in a notebook.

# %% A model, a tokenizer and prompts, built here; yours is any name or folder that `from_pretrained` takes.
import subprocess
import sys
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import dta_plugin

sys.path.insert(0, ".")
from recipes.quickstart.rewards import right_answer

FOLDER = "runs/examples"
if not Path(FOLDER, "data/train.jsonl").is_file():  # half a minute, once
    subprocess.run([sys.executable, "recipes/quickstart/build.py", "--output", FOLDER], check=True)

# %% The one line that is not TRL's: from here on, rollouts of a prompt share its computation.
dta_plugin.enable(verify="first")

# %% An ordinary TRL trainer.
trainer = GRPOTrainer(
    model=f"{FOLDER}/model",
    reward_funcs=right_answer,
    args=GRPOConfig(
        output_dir=f"{FOLDER}/grpo_lora",
        per_device_train_batch_size=64,  # 8 prompts, 8 completions of each
        num_generations=8,
        max_completion_length=24,
        learning_rate=2e-3,
        max_steps=20,
        logging_steps=5,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    ),
    train_dataset=load_dataset("json", data_files=f"{FOLDER}/data/train.jsonl", split="train"),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()

# %% What was learnt, and what was shared.
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
shared = [entry["dta/compression_ratio"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}; every computed token was used {shared[-1]:.1f} times")
