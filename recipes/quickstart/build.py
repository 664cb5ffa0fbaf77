"""Build the quickstart's model, tokenizer and data in a few seconds, with nothing but a CPU.

    python recipes/quickstart/build.py --output runs/quickstart

The task is clock arithmetic. Every prompt states a rule ("the clock shows 7 hours"), shows solved
exercises and ends with a new one; the answer is its chain of partial totals:

    Rule : the clock shows 7 hours . ...
    Add : 4 + 6 + 5 </s> Work : 4 + 6 = 3 ; 3 + 5 = 1 </s> ... Add : 2 + 6 + 6 + 1 </s> Work :

The model is a small Qwen3 that was pretrained here, briefly, on notebooks of such exercises written
by sloppy clerks: each partial total is off by one with probability `SLIP`. Like any base model it
imitates its corpus, slips included, so it solves about a third of the exercises. The prompts it gets
in training hold correct examples only, and no prompt is seen twice.

Promises: the same seed and thread count give the same files; `<output>/model` holds what
`from_pretrained` reads (model and tokenizer), `<output>/data/train.jsonl` the columns `prompt`
(text) and `answer` (the last total) that `trl grpo` and `rewards.py` need.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS = "<pad>", "</s>"
HOURS = range(5, 10)  # the rule of a notebook: how many hours its clock shows
TIMES = range(3, 5)  # numbers in one exercise
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri")
SLIP = 0.3  # how often a clerk of the pretraining corpus is off by one
EXAMPLES = 7  # solved exercises in a prompt
RULE = (
    "Rule : this is a {hours}h clock , from 0 to {last} . Add the numbers from left to right . "
    "When a total goes past the last hour , the clock starts again at 0 . "
    "Write down every partial total ; the last one is the answer ."
)


@dataclass(frozen=True)
class Exercise:
    """One sum on a clock: its text up to `Work :`, its solution, and the last total."""

    question: str
    work: str
    answer: int

    @classmethod
    def draw(cls, rng: random.Random, hours: int, slip: float = 0.0) -> Exercise:
        hour, stride, times = rng.randrange(hours), rng.randrange(1, hours), rng.choice(TIMES)
        question, steps = f"Ask : from {hour} go +{stride} , {times} times {EOS} Work :", []
        for _ in range(times):
            error = rng.choice((-1, 1)) if rng.random() < slip else 0
            arrival = (hour + stride + error) % hours
            steps.append(f"{hour} +{stride} = {arrival}")
            hour = arrival
        return cls(question, " ; ".join(steps), hour)


def notebook(rng: random.Random, examples: int, slip: float = 0.0) -> tuple[str, Exercise]:
    """A rule, solved exercises under it, and the question that follows; also its exercise."""
    hours = rng.choice(HOURS)
    solved = [Exercise.draw(rng, hours, slip) for _ in range(examples)]
    last = Exercise.draw(rng, hours, slip)
    lines = [RULE.format(hours=hours, last=hours - 1)]
    lines += [f"{exercise.question} {exercise.work} {EOS}" for exercise in solved]
    return " ".join([*lines, last.question]), last


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; the vocabulary is closed."""
    words = sorted({w for hours in HOURS for w in RULE.format(hours=hours, last=hours - 1).split()})
    words += sorted(set("Ask : from go , times Work = ;".split()) - set(words))
    words += sorted({str(d) for d in range(10)} - set(words)) + [f"+{d}" for d in range(1, 10)]
    vocab = {token: index for index, token in enumerate([PAD, EOS, *words])}
    core = Tokenizer(WordLevel(vocab, unk_token=PAD))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left")


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, steps: int, rows: int, examples: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of sloppy notebooks; only what follows a `Work :` is supervised."""
    start, end = tokenizer.convert_tokens_to_ids("Work"), tokenizer.eos_token_id
    for _ in range(steps):
        texts = []
        for _ in range(rows):
            prompt, last = notebook(rng, examples, SLIP)
            texts.append(f"{prompt} {last.work} {EOS}")
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
        # After `Work`, one `:` and then the solution up to and including its end mark.
        opened = (ids == start).cumsum(1)
        closed = (ids == end).cumsum(1).roll(1, 1)
        closed[:, 0] = 0
        supervised = (2 * opened - closed == 1) & (ids != start)
        supervised &= ids.roll(1, 1) != start
        yield ids, ids.masked_fill(~supervised, -100)


def pretrain(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int, rows: int, lr: float, examples: int
) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    loss = torch.tensor(math.nan)
    t0 = time.perf_counter()
    for step, (ids, labels) in enumerate(batches(rng, tokenizer, steps, rows, examples)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10, (steps - step) / (0.3 * steps))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0: print(step, round(loss.item(), 4), round(time.perf_counter() - t0, 1), ids.shape, (labels!=-100).float().mean().item())
    print("final", loss.item()); return loss.item()
