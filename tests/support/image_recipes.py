"""What recipes with images need to run here: a tiny Qwen3-VL that half knows the task, and a tiny Geometry3K."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pixels
from PIL import ImageDraw
from tokenizers import AddedToken
from transformers import Qwen2VLImageProcessorPil, set_seed

from recipes.quickstart import build_images
from recipes.quickstart.picture_processor import PictureProcessor
from tests.support import recipes as support

SIDE = 96  # pixels: nine tokens


def figure(number: int) -> Pixels.Image:
    """A triangle, another one for every number."""
    image = Pixels.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).polygon([(4, 90), (90, 90), (4 + 5 * number, 8)], outline="black")
    return image


def write_geometry3k(path: Path, rows: int = 16) -> None:
    """Questions about one figure each, whose answers are 7 and 8 in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "images": [[figure(i)] for i in range(rows)],
        "problem": ["<image>Find x."] * rows,
        "answer": [str(7 + i % 2) for i in range(rows)],
    }
    kinds = Features({"images": [Image()], "problem": Value("string"), "answer": Value("string")})
    Dataset.from_dict(columns, features=kinds).to_parquet(path)


def save_model(folder: Path, steps: int = 30) -> None:
    """A tiny Qwen3-VL that answers the recipe's prompt right and wrong, well formed and not; and its processor."""
    asked = support.names_of("geometry3k.py")["prompt"]("<image>Find x.")
    turns = ["It shows\n#### 7", "It shows\n#### 8", "It is 8."]
    processor = _processor([message["content"] for message in asked] + turns)
    set_seed(0)
    model = build_images.make_model(processor)
    content = [{"type": "image"}, {"type": "text", "text": asked[1]["content"]}]
    system = {"role": "system", "content": [{"type": "text", "text": asked[0]["content"]}]}
    prompt = processor.apply_chat_template([system, {"role": "user", "content": content}], add_generation_prompt=True)
    batch = []
    for turn in turns:
        inputs = processor(images=[figure(3)], text=[f"{prompt}{turn}<|im_end|>"], return_tensors="pt")
        written = len(processor.tokenizer(f"{turn}<|im_end|>").input_ids)
        labels = inputs["input_ids"].clone()
        labels[:, :-written] = -100
        batch.append({**inputs, "labels": labels})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        for inputs in batch:
            (model(**inputs).loss / len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    PictureProcessor.register_for_auto_class()
    processor.save_pretrained(folder)


def _processor(texts: list[str]) -> PictureProcessor:
    """Byte-level BPE with the special tokens and the chat template of Qwen3-VL."""
    tokenizer = support.make_tokenizer(texts)
    markers = [marker for marker in build_images.MARKERS if marker != "<|im_start|>"]
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    images = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, size={"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    )
    template = (support.TEMPLATES / "qwen3_vl.jinja").read_text()
    return PictureProcessor(images, tokenizer, chat_template=template)
