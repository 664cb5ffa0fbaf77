"""A training with the installed package and nothing of the checkout: `make wheel-check` runs a copy of this file.

A tiny random model, made here, through TRL's own GRPOTrainer with the flag and without: equal weights after two steps.
What PyPI would show of the package leads somewhere without the checkout, too.
"""

from __future__ import annotations

import re
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

import dta_plugin

WORDS = ["<pad>", "</s>", *"abcdefgh"]
LOCAL_LINK = re.compile(r"\]\((?!https://)[^)]*")


def save(folder: Path) -> None:
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), **sizes, **heads)).save_pretrained(folder)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(text.count("a")) for text in completions]


def train(folder: Path) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """(all weights after two steps, what was logged)."""
    options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "bf16": False}
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder / "run"), learning_rate=1e-3, seed=1, **options, **quiet),
        train_dataset=Dataset.from_list([{"prompt": " ".join("abcdefgh"[i:] * 4)} for i in range(4)]),
    )
    trainer.train()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), trainer.state.log_history


def main() -> None:
    package = Path(dta_plugin.__file__).resolve()
    assert "site-packages" in package.parts, f"this is no installed wheel's: {package}"
    readme = metadata.metadata("dta-plugin").get_payload()
    assert "](https://" in readme and not LOCAL_LINK.findall(readme), LOCAL_LINK.findall(readme)
    with tempfile.TemporaryDirectory() as name:
        save(Path(name))
        stock, _ = train(Path(name))
        dta_plugin.enable(verify="first")
        tree, log = train(Path(name))
    worst = (tree - stock).abs().max().item()
    shared = log[0]["dta/compression_ratio"]
    assert worst < 1e-5 and shared > 1, (worst, shared)
    print(f"dta-plugin {dta_plugin.__version__}, installed: weights as stock's to {worst:.0e}, {shared:.2f}x shared")


if __name__ == "__main__":
    main()
