"""What the tests of the `dta` command share: files of rollouts, a word-level tokenizer, tiny models on disk."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, PreTrainedTokenizerFast

from dta_plugin.cli import main
from dta_plugin.cli.rollouts import Rollout, read_file
from tests.support.models import tiny_config, tiny_model

AIRLINE = Path(__file__).parents[3] / "shared" / "data" / "tau_airline_gpt4o.jsonl.gz"
needs_airline = pytest.mark.skipif(
    not AIRLINE.exists(), reason="the tau-bench airline trajectories are not in ../shared/data beside the repository"
)

THINK_STRIPPING = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if loop.last or m.role != 'assistant' %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{% for c in m.tool_calls or [] %} {{ c.function.name }} {{ c.function.arguments.x }}{% endfor %} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def run_dta(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command."""
    capsys.readouterr()  # what preparing the test has printed
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line in which `dta` refuses its input."""
    code, out, err = run_dta(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.isascii() and err[:-1].isprintable()
    return err


def load_rollouts(path: str | Path, group_by: str | None = None, limit: int | None = None) -> list[Rollout]:
    """The rollouts of a file or folder, at most `limit`."""
    return read_file(path, group_by, limit).rollouts


def parts(rollout: Rollout) -> tuple[Any, Any]:
    """(prompt, completion) of a rollout, a chat as "role: content"."""
    if rollout.text is not None:
        return rollout.text
    cut = rollout.prompt_length
    if rollout.tokens is not None:
        return rollout.tokens[:cut].tolist(), rollout.tokens[cut:].tolist()
    texts = [f"{message['role']}: {message['content']}" for message in rollout.messages or []]
    return " ".join(texts[:cut]), " ".join(texts[cut:])


def write_rollouts(path: Path, rows: Iterable[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def save_tokenizer(folder: Path, words: str, chat_template: str | None = None) -> Path:
    """A tokenizer with one token per word of `words`, everything else unknown."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", *sorted(set(words.split()))])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def save_model(folder: Path, family: str = "qwen3", **changes: Any) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def save_config(folder: Path, family: str = "qwen3", **changes: Any) -> Path:
    """A model folder without weights."""
    tiny_config(family, **changes).save_pretrained(folder)
    return folder


def save_unsupported_config(folder: Path) -> Path:
    """GPT-2: absolute positions."""
    GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=50).save_pretrained(folder)
    return folder
