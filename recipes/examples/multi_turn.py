# %% [markdown]
# Several turns with an environment, on a CPU in under two minutes: the model answers, a checker asks again where the
# answer was wrong, and it answers once more. What the checker says is part of the row, and carries no loss.
# The cells run as a script (`python recipes/examples/multi_turn.py`, from the repository's root) or in a notebook.

# %% A model, a tokenizer and prompts, built here; yours is any name or folder that `from_pretrained` takes.
import subprocess
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

import dta_plugin

sys.path.insert(0, ".")
from recipes.quickstart.rewards import parse_answer

FOLDER = "runs/examples"
if not Path(FOLDER, "data/train.jsonl").is_file():  # half a minute, once
    subprocess.run([sys.executable, "recipes/quickstart/build.py", "--output", FOLDER], check=True)
data = load_dataset("json", data_files=f"{FOLDER}/data/train.jsonl", split="train")
answers = dict(zip(data["prompt"], data["answer"], strict=True))


# %% One turn of all rows: sampled by the trainer's own model.
def turn(trainer, rows):
    tokenizer = trainer.processing_class
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    out = trainer.model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=24)
    out = out[:, batch["input_ids"].shape[1] :]
    ends = [(row == tokenizer.eos_token_id).nonzero() for row in out]
    return [row[: int(end[0]) + 1 if len(end) else None].tolist() for row, end in zip(out, ends, strict=True)]


# %% Rollouts: answer, and where that was wrong the same question again. TRL gives every prompt as often as it wants
# rollouts of it, and takes one row for each. env_mask is 1 for the model's own tokens: only they carry loss.
def rollout(prompts, trainer):
    tokenizer = trainer.processing_class
    prompt_ids = tokenizer(prompts)["input_ids"]
    first = turn(trainer, prompt_ids)
    scores = [float(said(tokenizer, ids) == answers[prompt]) for ids, prompt in zip(first, prompts, strict=True)]
    completions, masks = first, [[1] * len(ids) for ids in first]
    wrong = [row for row, score in enumerate(scores) if not score]
    for row in wrong:
        question = tokenizer(prompts[row].splitlines()[-1])["input_ids"]
        completions[row] = completions[row] + question
        masks[row] += [0] * len(question)
    second = turn(trainer, [prompt_ids[row] + completions[row] for row in wrong]) if wrong else []
    for row, ids in zip(wrong, second, strict=True):
        completions[row] = completions[row] + ids
        masks[row] += [1] * len(ids)
        scores[row] = 0.5 * (said(tokenizer, ids) == answers[prompts[row]])
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completions,
        "logprobs": None,
        "env_mask": masks,
        "score": scores,
    }


def said(tokenizer, ids):
    return parse_answer(tokenizer.decode(ids, skip_special_tokens=True))


def reward(completions, score, **_):
    return score


# %% The one line that is not TRL's, and an ordinary trainer.
torch.manual_seed(0)
dta_plugin.enable(verify="first")
trainer = GRPOTrainer(
    model=f"{FOLDER}/model",
    reward_funcs=reward,
    rollout_func=rollout,
    args=GRPOConfig(
        output_dir=f"{FOLDER}/multi_turn",
        per_device_train_batch_size=64,  # 8 prompts, 8 rollouts of each
        num_generations=8,
        learning_rate=5e-4,
        max_steps=20,
        logging_steps=5,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    ),
    train_dataset=data,
)
trainer.train()

# %% What was learnt, and what was shared.
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
shared = [entry["dta/compression_ratio"] for entry in trainer.state.log_history if "reward" in entry]
print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}; every computed token was used {shared[-1]:.1f} times")
