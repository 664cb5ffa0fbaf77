# %% [markdown]
# DPO, on a CPU in under two minutes: several pairs of answers to the same prompts, which policy and reference compute
# once each. The cells run as a script (`python recipes/examples/dpo.py`, from the repository's root) or in a notebook.

# %% A model and a tokenizer, built here; yours is any name or folder that `from_pretrained` takes.
import random
import subprocess
import sys
from pathlib import Path

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import dta_plugin

sys.path.insert(0, ".")
from recipes.quickstart.build import notebook

FOLDER = "runs/examples"
if not Path(FOLDER, "data/train.jsonl").is_file():  # half a minute, once
    subprocess.run([sys.executable, "recipes/quickstart/build.py", "--output", FOLDER], check=True)

# %% Preferences: an exercise that is worked out, over a guess. Four pairs for every prompt.
rng = random.Random(0)
pairs = []
for _ in range(64):
    prompt, exercise = notebook(rng)
    pairs += [
        {"prompt": prompt, "chosen": f" {exercise.work}", "rejected": f" guess {hour}"}
        for hour in rng.sample(range(9), 4)
    ]

# %% The one line that is not TRL's: batches are made of siblings, and what they share is computed once.
dta_plugin.enable()

# %% An ordinary TRL trainer.
trainer = DPOTrainer(
    model=f"{FOLDER}/model",
    args=DPOConfig(
        output_dir=f"{FOLDER}/dpo",
        per_device_train_batch_size=8,
        learning_rate=5e-4,
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


# %% How often the model works an exercise out, before and after.
def share_worked():
    prompts = [pair["prompt"] for pair in pairs[::4]]
    batch = trainer.processing_class(prompts, padding=True, padding_side="left", return_tensors="pt")
    out = trainer.model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=24)
    answers = trainer.processing_class.batch_decode(out[:, batch["input_ids"].shape[1] :])
    return sum("guess" not in answer for answer in answers) / len(answers)


before = share_worked()
trainer.train()

# %% What was learnt, and what was shared.
shared = [entry["dta/compression_ratio"] for entry in trainer.state.log_history if "rewards/margins" in entry]
print(f"worked out {before:.2f} -> {share_worked():.2f}; every computed token was used {shared[-1]:.1f} times")
