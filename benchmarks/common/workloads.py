"""What the policy-update benchmark runs on: stars (one prompt, a group of completions), unrelated sequences, and
real agent rollouts, where every assistant turn is one sequence.

The rollouts are the recorded trials of one task of tau-bench's airline domain. They are read from a gzipped JSON-lines
file (``../shared/data/tau_airline_gpt4o.jsonl.gz`` beside this repository, or ``--rollouts``) and tokenized with a
byte-level BPE that is trained on the file's own text, so nothing is downloaded.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dta_plugin import PrefixTree

ROLLOUTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "tau_airline_gpt4o.jsonl.gz"
Turn = tuple[np.ndarray, int, float]  # tokens up to its end, tokens before it, reward


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """One row of the benchmark.

    sequences: int64 [len] prompt + completion, no padding. prompt_lengths: tokens before the completion.
    advantages: float32 [S], one per sequence. is_group: all sequences share their whole prompt.
    micro_batch: sequences per call of the dense path, which then accumulates gradients; None for one padded batch.
    note: what a reader of the result should know.
    """

    name: str
    sequences: list[torch.Tensor]
    prompt_lengths: list[int]
    advantages: torch.Tensor
    is_group: bool = False
    micro_batch: int | None = None
    note: str = ""

    @property
    def completion_lengths(self) -> list[int]:
        return [len(s) - p for s, p in zip(self.sequences, self.prompt_lengths, strict=True)]

    def to(self, device: torch.device) -> Workload:
        moved = [sequence.to(device) for sequence in self.sequences]
        return replace(self, sequences=moved, advantages=self.advantages.to(device))


def star(prompt: int, completion: int, group: int, vocab: int) -> Workload:
    """One prompt and `group` completions that differ from their first token on."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(vocab, (prompt,), generator=generator)
    tails = torch.randint(vocab, (group, completion), generator=generator)
    tails[:, 0] = torch.randperm(vocab, generator=generator)[:group]
    sequences = [torch.cat([shared, tail]) for tail in tails]
    name = f"{prompt}/{completion}/{group}"
    return Workload(name, sequences, [prompt] * group, _advantages(group), is_group=True)


def unrelated(prompt: int, completion: int, count: int, vocab: int) -> Workload:
    """Sequences that share nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab, (count, prompt + completion), generator=generator)
    rows[:, 0] = torch.randperm(vocab, generator=generator)[:count]
    return Workload("no sharing", list(rows), [prompt] * count, _advantages(count))


def comb(turns: int, turn: int, answer: int, vocab: int) -> Workload:
    """An agent whose every turn of `turn` tokens has a completion of `answer` tokens that the next one does not see."""
    generator = torch.Generator().manual_seed(0)
    trunk = torch.randint(vocab, (turns * turn,), generator=generator)
    answers = torch.randint(vocab, (turns, answer), generator=generator)
    prompts = [turn * (index + 1) for index in range(turns)]
    sequences = [torch.cat([trunk[:end], own]) for end, own in zip(prompts, answers, strict=True)]
    return Workload("comb", sequences, prompts, _advantages(turns))


def rollouts(path: Path, vocab: int) -> Workload:
    """All trials of the task whose tree is of median size, one sequence per assistant turn, micro-batches of one."""
    task, trials = _median_task(path, vocab)
    turns = [turn for trial in trials for turn in trial]
    note = f"task {task}, {len(turns)} turns of {len(trials)} trials; dense runs one turn per call"
    return _recorded("rollouts", turns, note)


def trajectories(path: Path, vocab: int) -> Workload:
    """The same trials, one sequence each: everything behind the first prompt is its completion, tools' text too."""
    task, trials = _median_task(path, vocab)
    whole = [(trial[-1][0], trial[0][1], trial[-1][2]) for trial in trials]
    return _recorded("trajectories", whole, f"task {task}, {len(trials)} trials; dense runs one per call")


def _median_task(path: Path, vocab: int) -> tuple[int, list[list[Turn]]]:
    """The task whose tree is of median size, and the assistant turns of each of its trials."""
    with gzip.open(path, "rt") as file:
        recorded = [json.loads(line) for line in file]
    encode = encoder(recorded, vocab)
    trials: dict[int, list[list[Turn]]] = {}
    for trajectory in recorded:
        trials.setdefault(trajectory["task_id"], []).append(turns_of(trajectory, encode))

    def tree_tokens(task: int) -> int:
        return PrefixTree.from_sequences([tokens for trial in trials[task] for tokens, _, _ in trial]).tree_tokens

    task = sorted(trials, key=lambda t: (tree_tokens(t), t))[len(trials) // 2]
    return task, trials[task]


def _recorded(name: str, rows: list[Turn], note: str) -> Workload:
    """Rows in micro-batches of one."""
    rewards = torch.tensor([reward for _, _, reward in rows])
    return Workload(
        name,
        [torch.from_numpy(tokens) for tokens, _, _ in rows],
        [prompt for _, prompt, _ in rows],
        # Trials of one task often all fail; noise keeps every completion in the gradient.
        rewards - rewards.mean() + _advantages(len(rows)),
        micro_batch=1,
        note=note,
    )


def _advantages(count: int) -> torch.Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return (values - values.mean()) / (values.std() + 1e-4)


def _segments(trajectory: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """Per message: whether the policy wrote it, its header, and its text with the end mark."""
    segments = []
    for message in trajectory["messages"]:
        text = message["content"] or ""
        if message.get("tool_calls"):
            text += "\n" + json.dumps(message["tool_calls"])
        role = message["role"]
        header = f"<|im_start|>{role} {message['name']}\n" if message.get("name") else f"<|im_start|>{role}\n"
        segments.append((role == "assistant", header, f"{text}<|im_end|>\n"))
    return segments


def encoder(trajectories: list[dict[str, Any]], vocab: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    texts = ("".join(header + text for _, header, text in _segments(t)) for t in trajectories)
    tokenizer.train_from_iterator(
        texts, vocab_size=vocab, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    return lambda text: tokenizer.encode(text).ids


def turns_of(trajectory: dict[str, Any], encode: Any) -> list[Turn]:
    """(tokens up to the end of the turn, tokens before the turn, reward) of every assistant turn."""
    turns, context = [], []
    for by_policy, header, text in _segments(trajectory):
        context += encode(header)
        start = len(context)
        context += encode(text)
        if by_policy:
            turns.append((np.array(context, dtype=np.int64), start, float(trajectory["reward"])))
    return turns
