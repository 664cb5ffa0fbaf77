"""Build the diffusion quickstart's model, tokenizer and data: no network, no GPU, under a minute.

    python recipes/quickstart/diffusion.py --output runs/quickstart_diffusion

The task is to add two digits: the prompt `7 + 5 =`, the completion `1 2`. The model is a small bidirectional Qwen3,
taught masked-diffusion style (a random share of the completion is hidden, and predicted) by a pupil who gets most sums
wrong by one: it knows how sums are written and roughly what they are. What is left to learn is to be right.

Promises: the same seed gives the same files. `<output>/model` is what `load_diffusion_lm` reads, with a tokenizer;
`<output>/data/train.jsonl` has the columns `prompt` and `answer`, random sums.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from dta_plugin.diffusion import bidirectional

WORDS = ["<pad>", "</s>", "<mask>", "+", "=", *map(str, range(10))]
CANVAS = 4  # tokens of a completion: two digits, and end tokens
WRONG = 0.6  # how often the pupil's sum is off by one


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of a closed vocabulary."""
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", mask_token="<mask>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """About 0.1 M weights; attends in both directions."""
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(bidirectional(config, mask_token_id=tokenizer.mask_token_id))


def prompt(a: int, b: int) -> str:
    return f"{a} + {b} ="


def answer(total: int) -> str:
    """The number's digits, one word each."""
    return " ".join(str(total))


def pupil_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noised ids, clean ids [rows, prompt + CANVAS], and the weight of each position in the loss."""
    ids = []
    for _ in range(rows):
        a, b = rng.randrange(10), rng.randrange(10)
        total = a + b + (rng.choice((-1, 1)) if rng.random() < WRONG else 0)
        tokens = tokenizer(f"{prompt(a, b)} {answer(max(total, 0))}").input_ids
        ids.append(tokens + [tokenizer.eos_token_id] * (4 + CANVAS - len(tokens)))
    clean = torch.tensor(ids)
    share = torch.rand(rows, 1).clamp(min=0.1)
    hidden = torch.rand(clean.shape) < share
    hidden[:, :4] = False
    return clean.masked_fill(hidden, tokenizer.mask_token_id), clean, hidden / share


def pretrain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int) -> float:
    """Masked-diffusion training with linear decay; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    loss = torch.zeros(())
    for _ in range(steps):
        noised, clean, weight = pupil_batch(rng, tokenizer, rows=64)
        log_probs = model(input_ids=noised, use_cache=False).logits.log_softmax(dim=-1)
        loss = -(log_probs.gather(2, clean[..., None])[..., 0] * weight).sum(dim=1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def write_prompts(path: Path, rng: random.Random, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for _ in range(count):
            a, b = rng.randrange(10), rng.randrange(10)
            print(json.dumps({"prompt": prompt(a, b), "answer": answer(a + b)}), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_diffusion"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800, help="pretraining steps")
    parser.add_argument("--prompts", type=int, default=1024, help="rows of train.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are tiny, and the files must not depend on the machine's cores
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    loss = pretrain(model, tokenizer, random.Random(f"pupil {args.seed}"), args.steps)
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    write_prompts(args.output / "data" / "train.jsonl", random.Random(f"prompts {args.seed}"), args.prompts)
    seconds = time.perf_counter() - start
    print(
        f"[build] {model.num_parameters():,} weights in {args.output / 'model'}, last loss {loss:.2f}, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
