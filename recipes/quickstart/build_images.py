"""Build the image quickstart's model, processor and data: no network, no GPU, no torchvision, under a minute.

    python recipes/quickstart/build_images.py --output runs/quickstart_images

The task is to count the shapes in a picture (shapes.py). The model is a small Qwen3-VL, taught here by the notes of
two kinds of clerks. The first count colour by colour, and miscount one with probability `SLIP`. The second do the same,
when they do, but with probability `HURRY` they just write a number:

    red 1 + green 0 + blue 2 = 3          Maybe 4

A base model imitates its corpus: it can count, yet guesses more often than it does. That gap is what GRPO closes with
nothing but "was the number right?". `--hybrid` makes it a Qwen3.5, whose first layer is recurrent.

Promises: the same seed gives the same files. `<output>/model` is what `from_pretrained` reads: the model and, with
remote code trusted, its processor. `<output>/data/train.parquet` has the columns `image`, `prompt` and `answer`, as
data for a released model would. Its pictures all differ: a reward curve over one epoch is one over unseen pictures.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes.quickstart.picture_processor import PictureProcessor
from recipes.quickstart.pretraining import pretrain
from recipes.quickstart.shapes import CELL, COLOURS, PROMPT, QUESTION, SIDE, Picture

PAD, EOS = "<|endoftext|>", "<|im_end|>"
MARKERS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SLIP = 0.05  # how often a clerk miscounts a colour by one
HURRY = 0.65  # how often a clerk in a hurry guesses instead of counting


def make_processor() -> PictureProcessor:
    """One token per word of a closed vocabulary, one per cell of a picture; the markers of Qwen's chat template."""
    text = " ".join([QUESTION, "user assistant Maybe + =", *map(str, range(SIDE**2 + 1))])
    words = [word for word, _ in Whitespace().pre_tokenize_str(text)]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([PAD, EOS, *MARKERS, *words]))}
    core = Tokenizer(WordLevel(vocab, unk_token=PAD))
    core.pre_tokenizer = Whitespace()
    core.add_special_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)
    images = Qwen2VLImageProcessorPil(
        patch_size=CELL // 2, merge_size=2, size={"shortest_edge": CELL**2, "longest_edge": 64 * CELL**2}
    )
    return PictureProcessor(images, tokenizer, chat_template=TEMPLATE)


def make_model(processor: PictureProcessor, hybrid: bool = False) -> PreTrainedModel:
    """About 0.5 M weights, half of them for pixels. Wide init and a short RoPE base: it learns in seconds.

    hybrid: a Qwen3.5, whose first layer is a delta rule, in the place of a Qwen3-VL. Its wider epsilon keeps the norm
    of what the rule reads from a state, at times nearly 0, from amplifying rounding.
    """
    tokenizer = processor.tokenizer
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [6, 5, 5]},
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": CELL // 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 4 * SIDE**2,
        "initializer_range": 0.1,
    }
    if hybrid:
        text |= {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 32,
            "rms_norm_eps": 1e-2,
        }
    else:
        vision["deepstack_visual_indexes"] = [0]
    config = CONFIG_MAPPING["qwen3_5" if hybrid else "qwen3_vl"](
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=True,
    )
    return AutoModelForImageTextToText.from_config(config)


def note(rng: random.Random, counts: list[int], hurry: float) -> str:
    """What a clerk writes about a picture."""
    if rng.random() < hurry:
        return f"Maybe {rng.randrange(SIDE**2 + 1)}"
    slips = [rng.choice((-1, 1)) if rng.random() < SLIP else 0 for _ in counts]
    seen = [min(max(count + slip, 0), SIDE) for count, slip in zip(counts, slips, strict=True)]
    return f"{' + '.join(f'{colour} {count}' for colour, count in zip(COLOURS, seen, strict=True))} = {sum(seen)}"


def corpus_batch(rng: random.Random, processor: PictureProcessor, rows: int, hurry: float) -> dict[str, torch.Tensor]:
    """Pictures, the question and clerks' notes as the model takes them; only the notes are supervised."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [Picture.draw(rng) for _ in range(rows)]
    texts = [f"{prompt}{note(rng, picture.counts(), hurry)}{EOS}" for picture in pictures]
    inputs = processor(images=[picture.image() for picture in pictures], text=texts, padding=True, return_tensors="pt")
    is_end = inputs["input_ids"] == processor.tokenizer.eos_token_id
    ends_before = is_end.cumsum(1) - is_end.long()  # 1: the question has ended, the note has not
    return {**inputs, "labels": inputs["input_ids"].masked_fill(ends_before != 1, -100)}


def prompts(rng: random.Random, count: int) -> Dataset:
    """Pictures that all differ, with the question and its answer."""
    pictures: dict[Picture, None] = {}
    while len(pictures) < count:
        pictures[Picture.draw(rng)] = None
    rows = [{"image": picture.image(), "prompt": PROMPT, "answer": sum(picture.counts())} for picture in pictures]
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_list(rows, features=Features({"image": Image(), "prompt": [message], "answer": Value("int64")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_images"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="pretraining steps")
    parser.add_argument("--hybrid", action="store_true", help="a Qwen3.5, with a recurrent layer")
    parser.add_argument("--prompts", type=int, default=512, help="rows of train.parquet")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are tiny, and the files must not depend on the machine's cores
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    processor = make_processor()
    model = make_model(processor, args.hybrid)
    rng = random.Random(f"corpus {args.seed}")

    def batch(step: int) -> dict[str, torch.Tensor]:
        return corpus_batch(rng, processor, rows=16, hurry=HURRY if step >= 0.7 * args.steps else 0.0)

    loss = pretrain(model, batch, args.steps, peak_lr=3e-3)
    model.save_pretrained(args.output / "model")
    PictureProcessor.register_for_auto_class()
    processor.save_pretrained(args.output / "model")
    path = args.output / "data" / "train.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts(random.Random(f"prompts {args.seed}"), args.prompts).to_parquet(path)
    seconds = time.perf_counter() - start
    print(
        f"[build] {model.num_parameters():,} weights and {args.prompts} pictures in {args.output}, "
        f"last loss {loss:.2f}, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
