"""What the recipes need to run here: a tiny Qwen3 that half knows the task, a tiny GSM8K, and FSDP2 on CPUs.

As a script it is one rank of FSDP2 runs on CPUs, under torchrun, each with the arguments of `dta_plugin.run`:

    torchrun --nproc_per_node 2 -m tests.support.recipes gsm8k.py --config ... --then gsm8k.py --config ...
"""

from __future__ import annotations

import functools
import json
import os
import random
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate import PartialState
from accelerate.utils import DistributedType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import get_json_schema

from dta_plugin import run
from dta_plugin.models import tiled_logprobs as logprobs

RECIPES = Path(__file__).parents[2] / "recipes"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

THEN = "--then"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A conversation and the turn that follows it, as the model should write it."""

    messages: Messages
    turn: str
    tools: list[Any] | None = None

    def prompt(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """The conversation as TRL renders it: with tools, by the template that keeps every turn as it was."""
        template = (TEMPLATES / "qwen3_training.jinja").read_text() if self.tools else None
        return tokenizer.apply_chat_template(
            self.messages,
            tools=self.tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )


def names_of(script: str) -> dict[str, Any]:
    """The functions and constants of a recipe's script."""
    return runpy.run_path(str(RECIPES / "trl" / script))


def write_gsm8k(path: Path, rows: int = 16) -> str:
    """Questions whose answers are 7 and 8 in turn, as JSONL; returns the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for i in range(rows):
            question = f"Ada has {i + 1} pens, gives some away and gets new ones. How many pens does she have?"
            print(json.dumps({"question": question, "answer": f"She has {7 + i % 2}.\n#### {7 + i % 2}"}), file=file)
    return str(path)


def gsm8k_examples() -> list[Example]:
    """One prompt of the recipe with right and wrong answers, well formed and not."""
    prompt = names_of("gsm8k.py")["prompt"]("Ada has 4 pens and gets new ones. How many pens does she have?")
    return [Example(prompt, turn) for turn in ("She has\n#### 7", "She has\n#### 8", "She has 8.")]


def tool_examples() -> list[Example]:
    """The recipe's first story: one of two calls and then the answer, or an answer without any call."""
    names = names_of("tools.py")
    tools, story = [get_json_schema(names["calculate"])], names["story"](random.Random(0))["prompt"]
    examples = [Example(story, "#### 40", tools)]
    for expression, value in (("6 * 7", "42"), ("6 * 8", "48")):
        call = {"name": "calculate", "arguments": {"expression": expression}}
        result: Messages = [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "name": "calculate", "content": value},
        ]
        examples.append(Example(story, f"<tool_call>\n{json.dumps(call)}\n</tool_call>", tools))
        examples.append(Example(story + result, f"#### {value}", tools))
    return examples


def save_model(folder: Path, examples: list[Example], steps: int = 30, family: str = "qwen3", **changes: Any) -> str:
    """A tiny Qwen3 that mostly imitates these examples, and its tokenizer; returns the folder's name.

    family, changes: another family, and what its config has beside a Qwen3's.
    """
    tokenizer = make_tokenizer([json.dumps([example.messages, example.tools]) for example in examples])
    set_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
    model = AutoModelForCausalLM.from_config(config)
    _imitate(model, tokenizer, examples, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens and the chat template of Qwen3."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    return tokenizer


def _imitate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: list[Example], steps: int) -> None:
    """Supervised training on the turns alone."""
    batch = []
    for example in examples:
        prompt = tokenizer(example.prompt(tokenizer)).input_ids
        turn = tokenizer(f"{example.turn}<|im_end|>").input_ids
        batch.append((torch.tensor([prompt + turn]), torch.tensor([[-100] * len(prompt) + turn])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        for ids, labels in batch:
            (model(input_ids=ids, labels=labels).loss / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp_on_cpus() -> None:
    """Let accelerate wrap models with FSDP on CPUs: it asks for a kind of GPU only to tell that there are ranks."""
    own = PartialState.__init__

    @functools.wraps(own)
    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    fsdp_on_cpus()
    if os.environ["RANK"] == "0":
        logprobs._TILE_ROWS = 4  # real batches, too, can need more tiles on one rank than on the other
    for index, arguments in enumerate("\0".join(sys.argv[1:]).split(f"\0{THEN}\0")):
        if index and os.environ["RANK"] == "0":
            print(THEN, flush=True)
        run.main(arguments.split("\0"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a gloo thread that drops its last tensor while Python shuts down aborts the process
