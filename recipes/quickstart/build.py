"""Build the quickstart's model, tokenizer and data: no network, no GPU, well under 30 seconds.

    python recipes/quickstart/build.py --output runs/quickstart

The task is walking round a clock. A prompt states the rule, shows solved exercises (different ones
in every prompt) and asks a new one; the completion is the chain of hours, its last one the answer:

    Rule : this is a 7h clock , with the hours 0 to 6 . ...
    Ask : from 4 go +4 , three times </s> Work : 4 +4 = 1 ; 1 +4 = 5 ; 5 +4 = 2 </s> ...
    Ask : from 2 go +3 , four times </s> Work :

The model is a small Qwen3, pretrained here on notebooks of two kinds of clerks. The first work out
every hop, and land one hour off with probability `SLIP`. The second do the same, when they do, but
with probability `HURRY` they just write `guess 3`. A base model imitates its corpus: it knows every
hop, yet guesses more often than it works, and slips; it solves about 0.4 of the exercises. That gap
is what GRPO closes with nothing but "was the answer right?". The model learns to think first (its
completions double in length), then to think with care. `--hybrid` makes it a Qwen3.5.

Promises: the same seed gives the same files. `<output>/model` is what
`from_pretrained` reads (model and tokenizer); `<output>/data/train.jsonl` has the columns `prompt`
and `answer` which `trl grpo` and `rewards.py` need. Its examples are worked and correct, and its
prompts all differ, so a reward curve over one epoch is a curve over unseen prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes.quickstart.pretraining import pretrain

PAD, EOS = "<pad>", "</s>"
HOURS = range(5, 9)  # how many hours a clock shows: the rule of one notebook
STRIDES = range(1, 5)  # hours per hop
TIMES = {"three": 3, "four": 4}  # hops in one exercise
EXAMPLES = 7  # solved exercises in a prompt (about 280 tokens with the rule)
SLIP = 0.05  # how often a clerk's hop lands one hour off
HURRY = 0.65  # how often a clerk in a hurry guesses instead of working
RULE = (
    "Rule : this is a {hours}h clock , with the hours 0 to {last} . Start at the given hour and "
    "go forward by the given number , as many times as asked . After the hour {last} comes 0 "
    "again . Write down every hop of the work ; the hour it ends on is the answer ."
)


@dataclass(frozen=True)
class Exercise:
    """One walk on a clock: its question, the work that solves it, and the hour it ends on."""

    question: str
    work: str
    answer: int

    @classmethod
    def draw(cls, rng: random.Random, hours: int, slip: float, hurry: float) -> Exercise:
        hour, stride, times = rng.randrange(hours), rng.choice(STRIDES), rng.choice(list(TIMES))
        question = f"Ask : from {hour} go +{stride} , {times} times {EOS} Work :"
        if rng.random() < hurry:
            guess = rng.randrange(hours)
            return cls(question, f"guess {guess}", guess)
        hops = []
        for _ in range(TIMES[times]):
            error = rng.choice((-1, 1)) if rng.random() < slip else 0
            end = (hour + stride + error) % hours
            hops.append(f"{hour} +{stride} = {end}")
            hour = end
        return cls(question, " ; ".join(hops), hour)


def notebook(rng: random.Random, slip: float = 0.0, hurry: float = 0.0) -> tuple[str, Exercise]:
    """A prompt (the rule, solved exercises, an open question) and the exercise it leaves open."""
    hours = rng.choice(HOURS)
    *solved, last = (Exercise.draw(rng, hours, slip, hurry) for _ in range(EXAMPLES + 1))
    lines = [RULE.format(hours=hours, last=hours - 1)]
    lines += [f"{exercise.question} {exercise.work} {EOS}" for exercise in solved]
    return "\n".join([*lines, last.question]), last


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of a closed vocabulary; `</s>` inside a prompt is the real end token."""
    words = [word for hours in HOURS for word in RULE.format(hours=hours, last=hours - 1).split()]
    words += ["Ask", ":", "from", "go", ",", "times", "Work", "=", ";", "guess", *TIMES]
    words += [f"{sign}{digit}" for sign in ("", "+") for digit in range(10)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([PAD, EOS, *words]))}
    core = Tokenizer(WordLevel(vocab, unk_token=PAD))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)


def make_model(tokenizer: PreTrainedTokenizerFast, hybrid: bool = False) -> PreTrainedModel:
    """About 0.13 M weights. Wide init and a short RoPE base: it learns to copy in seconds.

    hybrid: a Qwen3.5, whose first layer is a delta rule, in the place of a Qwen3. Its wider epsilon keeps the norm of
    what the rule reads from a state, at times nearly 0, from amplifying rounding.
    """
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if hybrid:
        options |= {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 32,
            "rms_norm_eps": 1e-2,
        }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_5_text" if hybrid else "qwen3"](**options))


def corpus_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, rows: int, hurry: float
) -> dict[str, torch.Tensor]:
    """Ids and labels of clerks' notebooks; only the work of each exercise is supervised."""
    pages = (notebook(rng, SLIP, hurry) for _ in range(rows))
    texts = [f"{prompt} {last.work} {EOS}" for prompt, last in pages]
    ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    is_end = ids == tokenizer.eos_token_id
    ends_before = is_end.cumsum(1) - is_end.long()  # odd: a question was closed, its work was not
    return {"input_ids": ids, "labels": ids.masked_fill(ends_before % 2 == 0, -100)}


def write_prompts(path: Path, rng: random.Random, count: int) -> None:
    prompts: dict[str, int] = {}
    while len(prompts) < count:
        prompt, exercise = notebook(rng)
        prompts[prompt] = exercise.answer
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for prompt, answer in prompts.items():
            print(json.dumps({"prompt": prompt, "answer": answer}), file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="pretraining steps")
    parser.add_argument("--hybrid", action="store_true", help="a Qwen3.5, with a recurrent layer")
    parser.add_argument("--prompts", type=int, default=1024, help="rows of train.jsonl")
    args = parser.parse_args()

    def report(text: str, since: float) -> None:
        print(f"[build] {text} ({time.perf_counter() - since:.1f} s)", flush=True)

    torch.set_num_threads(1)  # the matrices are tiny, and the files must not depend on the machine's cores
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.hybrid)

    start = time.perf_counter()
    rng = random.Random(f"corpus {args.seed}")

    def batch(step: int) -> dict[str, torch.Tensor]:
        return corpus_batch(rng, tokenizer, rows=8, hurry=HURRY if step >= 0.7 * args.steps else 0.0)

    loss = pretrain(model, batch, args.steps, peak_lr=5e-3)
    report(f"pretrained {model.num_parameters():,} weights for {args.steps} steps, last loss {loss:.3f}", start)

    start = time.perf_counter()
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    report(f"saved model and tokenizer ({len(tokenizer)} tokens) to {args.output / 'model'}", start)

    start = time.perf_counter()
    write_prompts(args.output / "data" / "train.jsonl", random.Random(f"prompts {args.seed}"), args.prompts)
    report(f"wrote {args.prompts} prompts to {args.output / 'data' / 'train.jsonl'}", start)


if __name__ == "__main__":
    main()
