"""Make the quickstart's model and data readable for verl; run recipes/quickstart/build.py first.

    python recipes/verl/build.py runs/quickstart

verl reads conversations from parquet or JSON lines, renders them with the tokenizer's chat template, and asks a Qwen
tokenizer for the two tokens that end a turn. So `<folder>/verl/model` is the model with a template that returns the
prompt as it is and with those two tokens, which never occur; `<folder>/verl/train.jsonl` has the same prompts in the
same order, as conversations of one message, and the answers where verl's reward function gets them from.

Promises: prompts have the same token ids as in TRL's quickstart. Neither torch nor verl is needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_model(source: Path, target: Path) -> None:
    """A copy of the model whose tokenizer has a chat template and the tokens of a turn's end."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "<|im_end|>")])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)


def write_data(source: Path, target: Path) -> int:
    """The rows as verl wants them, and their number. Lines are joined by spaces: a line break is a token now."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    with target.open("w") as file:
        for index, row in enumerate(rows):
            print(json.dumps(conversation(row["prompt"], row["answer"], index)), file=file)
    return len(rows)


def conversation(prompt: str, answer: int, index: int) -> dict[str, object]:
    """One row of verl's data: a prompt, and what its reward is computed from."""
    return {
        "data_source": "quickstart",
        "prompt": [{"role": "user", "content": prompt.replace("\n", " ")}],
        "reward_model": {"style": "rule", "ground_truth": str(answer)},
        "extra_info": {"index": index},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what recipes/quickstart/build.py was given as --output")
    folder = parser.parse_args().folder
    write_model(folder / "model", folder / "verl" / "model")
    rows = write_data(folder / "data" / "train.jsonl", folder / "verl" / "train.jsonl")
    print(f"[build] wrote {folder / 'verl'}: the model, and {rows} prompts for verl")


if __name__ == "__main__":
    main()
