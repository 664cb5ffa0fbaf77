"""The model, data and reward of recipes/verl/diffusion.sh: no network, no GPU, a few seconds.

    python recipes/verl/diffusion.py runs/diffusion

A diffusion LM with random weights gets prompts of a few digits and is rewarded for every 7 that it writes back. It can
only learn that from rewards: one digit in fifteen is a 7 at first. The model is a small Qwen3 that attends in both
directions (`dta_plugin.diffusion.bidirectional`), the tokenizer has a word per token and one for the mask.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

WANTED, LENGTH = "7", 8  # the digit, and the tokens of a response
SPECIAL = ["<pad>", "</s>", "<mask>", "<|im_end|>", "\n"]  # verl asks a Qwen tokenizer for the last two
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def compute_score(solution_str: str, **_: Any) -> float:
    """verl's reward: the share of the response that is the wanted digit."""
    return solution_str.split().count(WANTED) / LENGTH


def write_model(folder: Path, seed: int) -> None:
    """Model and tokenizer, as `from_pretrained` reads them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    from dta_plugin.diffusion import bidirectional

    words = [*SPECIAL, *"0123456789"]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", mask_token="<mask>", unk_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "\n"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    forbidden = tuple(words.index(word) for word in ("<pad>", "<|im_end|>", "\n"))
    config = bidirectional(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            pad_token_id=words.index("<pad>"),
            bos_token_id=None,
            eos_token_id=words.index("</s>"),
        ),
        mask_token_id=words.index("<mask>"),
        forbidden_token_ids=forbidden,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_data(path: Path, rows: int, seed: int) -> None:
    """Prompts as verl reads them."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for index in range(rows):
            row = {
                "data_source": "diffusion",
                "prompt": [{"role": "user", "content": " ".join(rng.choices("0123456789", k=rng.randint(3, 6)))}],
                "reward_model": {"style": "rule", "ground_truth": WANTED},
                "extra_info": {"index": index},
            }
            print(json.dumps(row), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_model(args.folder / "model", args.seed)
    write_data(args.folder / "train.jsonl", args.prompts, args.seed)
    print(f"[diffusion] wrote {args.folder}: the model, and {args.prompts} prompts")


if __name__ == "__main__":
    main()
