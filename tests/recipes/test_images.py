"""The image quickstart: built, trained for two steps with stock TRL and with the flag; its pictures and its reward."""

from __future__ import annotations

import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from safetensors.torch import load_file
from transformers import AutoProcessor
from trl.scripts import grpo

from dta_plugin.run import main
from recipes.quickstart import shapes
from tests.recipes.test_trl import Trained, assert_same, process_as_it_was  # noqa: F401
from tests.support import recipes as support

RECIPE = support.RECIPES / "trl" / "quickstart_images.yaml"
BUILD = support.RECIPES / "quickstart" / "build_images.py"


def build(folder: Path, *options: str) -> Path:
    """What build_images.py writes, after less pretraining."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", [str(BUILD), "--output", str(folder), "--steps", "40", "--prompts", "16", *options])
        runpy.run_path(str(BUILD), run_name="__main__")
    return folder


def train(folder: Path, output: Path, *more: str) -> None:
    """Two steps of the recipe on 2 pictures x 8 completions."""
    small = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "data",
        "output_dir": output,
        "per_device_train_batch_size": 16,
        "max_steps": 2,
        "warmup_steps": 0,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    flags = [text for name, value in small.items() for text in (f"--{name}", str(value))]
    main([str(grpo.__file__), "--config", str(RECIPE), *flags, *more])


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_trains_as_stock_trl_does(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dta_plugin")
    folder = build(tmp_path / "built", *(["--hybrid"] if family == "qwen3_5" else []))
    check_processor(folder)
    runs = {}
    for name, more in {"stock": ["--use_dta", "false"], "tree": ["--dta_prune", "never"]}.items():
        capsys.readouterr(), caplog.clear()
        train(folder, tmp_path / name, *more)
        runs[name] = Trained.read(tmp_path / name, capsys.readouterr().out + caplog.text)
    assert runs["stock"].said == "" and "verified against dense" in runs["tree"].said
    assert all(step["dta/compression_ratio"] > 4 for step in runs["tree"].steps)
    assert_same(runs["stock"], runs["tree"])
    start = load_file(folder / "model" / "model.safetensors")
    assert any((start[name] != weight).any() for name, weight in runs["tree"].weights.items() if "visual" in name)


def test_pictures_and_reward(tmp_path: Path) -> None:
    """Shapes are counted as drawn; the last number is what counts; rows are as TRL and a processor read them."""
    picture = shapes.Picture.draw(random.Random(1))
    pixels = np.asarray(picture.image()).reshape(shapes.SIDE, shapes.CELL, shapes.SIDE, shapes.CELL, 3)
    seen = pixels[:, shapes.CELL // 2, :, shapes.CELL // 2].reshape(-1, 3).tolist()
    colours = {"red": [255, 0, 0], "green": [0, 128, 0], "blue": [0, 0, 255]}
    assert picture.counts() == [seen.count(colours[colour]) for colour in shapes.COLOURS]
    assert sum(picture.counts()) == sum(cell is not None for cell in picture.cells) > 0

    texts = ["red 1 + green 0 + blue 2 = 3", "Maybe 3", "3 or 4", "", "three"]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    assert shapes.right_count(turns, answer=[3] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]

    folder = build(tmp_path, "--steps", "1")
    check_processor(folder)
    rows = load_dataset(str(folder / "data"), split="train")
    assert rows.column_names == ["image", "prompt", "answer"] and len(rows) == 16
    assert len({row["image"].tobytes() for row in rows}) == 16


def check_processor(folder: Path) -> None:
    """As TRL loads it, it reads a row of the data: a token for every cell and for every word."""
    row = load_dataset(str(folder / "data"), split="train")[0]
    processor = AutoProcessor.from_pretrained(folder / "model", trust_remote_code=True)
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["prompt"][0]["content"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == shapes.SIDE**2
    assert processor.tokenizer.pad_token_id not in inputs["input_ids"]
    assert shapes.QUESTION.replace(",", " ,").replace(".", " .").replace("?", " ?") in processor.decode(
        inputs["input_ids"][0]
    )
