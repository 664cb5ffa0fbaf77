"""Tiny vision-language models with their processors, for real trainers: prompts with random images, made here.

The tokenizer has one token per word. The image processor is the one of Qwen2-VL, by PIL; videos there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from trl.trainer import utils

from tests.support.vision_images import IMAGE
from tests.support.vision_models import VOCABULARY, rows_of, vision_model

_MARKS = {"<|image_pad|>": IMAGE, "<|video_pad|>": 91, "<|vision_start|>": 92, "<|vision_end|>": 93}
_TEMPLATE = (
    "{% for message in messages %}w9 {% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w10{% endif %}"
)


class Processor(Qwen2_5_VLProcessor):
    """With a stand-in for videos, whose own class needs torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


def processor() -> Qwen2_5_VLProcessor:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = {word: i for word, i in words.items() if i not in _MARKS.values()} | _MARKS
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=list(_MARKS),
        padding_side="left",  # TRL asks for it
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 16, "longest_edge": 4096}
    )
    videos = SimpleNamespace(merge_size=2, model_input_names=[])
    return Processor(images, tokenizer, videos, chat_template=_TEMPLATE)


def save_vision_model(folder: Path, family: str = "qwen2_5_vl") -> str:
    """Returns the folder's name."""
    model = vision_model(family, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 0.5  # log-probs of a few nats
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return str(folder)


def picture(number: int) -> Image.Image:
    """Random pixels, of one of three sizes."""
    height, width = [(8, 8), (8, 12), (12, 8)][number % 3]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions(images: Sequence[Sequence[int]], texts: int = 2) -> Dataset:
    """A prompt per entry with these images before its text, of which there are so many different ones."""
    rows = [
        {
            "prompt": [{"role": "user", "content": " ".join(f"w{5 + i % texts}" for _ in range(4))}],
            "images": [picture(number) for number in own],
        }
        for i, own in enumerate(images)
    ]
    return Dataset.from_list(rows)


@dataclass
class TowerCalls:
    """Of each call of the tower while log-probs are computed with a gradient: how many images, and patches."""

    images: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)

    def watch(self, trainer: Any) -> None:
        """For `prepare` of a training."""

        def called(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            grids = keywords.get("grid_thw", arguments[-1])
            if torch.is_grad_enabled():
                self.images.append(len(grids))
                self.patches.append(int(grids.prod(dim=-1).sum()))

        trainer.model.model.visual.register_forward_pre_hook(called, with_kwargs=True)


def look(question: str) -> str:
    """Look again.

    Args:
        question: What for.
    """
    return question


@dataclass(frozen=True)
class Tools:
    """For `prepare` of a training: completions in which a tool has answered by images, and a model gone on.

    The tokens depend on the step alone. Of every four rows, the first has no image from a tool, the second two, the
    third one, the fourth ends with one, so that nothing that is read comes after it. cut: the last row's last image has
    lost a token, as by truncation.
    """

    cut: bool = False

    def __call__(self, trainer: Any) -> None:
        trainer.tools = [look]
        trainer._tool_call_loop = lambda *batch: self._loop(trainer, *batch)

    def _loop(self, trainer: Any, prompts: list[Any], prompt_ids: list[Any], *_: Any) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(100 + trainer.state.global_step)

        def words(count: int) -> list[int]:
            return torch.randint(11, 80, (count,), generator=generator).tolist()

        completions, masks, images = [], [], []
        for row in range(len(prompts)):
            own = [picture(10 + row // 4 + i) for i in range((0, 2, 1, 1)[row % 4])]
            ids, mask = words(3), [1, 1, 1]
            for image in own:
                height, width = image.height // 2, image.width // 2
                answer = [92, *[IMAGE] * (height * width // 4), 93]
                ids, mask = [*ids, *answer], [*mask, *[0] * len(answer)]
                if row % 4 != 3:
                    ids, mask = [*ids, *words(2)], [*mask, 1, 1]
            completions.append(ids)
            masks.append(mask)
            images.append(own)
        if self.cut:
            completions[-1], masks[-1] = completions[-1][:-2], masks[-1][:-2]
        texts = trainer.processing_class.batch_decode(completions, skip_special_tokens=True)
        messages = [[{"role": "assistant", "content": text}] for text in texts]
        return masks, messages, completions, None, len(prompts), 0, images


def buffered(model: PreTrainedModel, parts: list[list[Any]], prompt: int) -> dict[str, Any]:
    """A micro-batch of these rows, of which the first `prompt` parts are the prompt; all tokens are read."""
    found = rows_of(model.config.model_type, parts)
    lengths = [len(rows_of(model.config.model_type, [row[:prompt]]).sequences[0]) for row in parts]
    prompts = [row[:n] for row, n in zip(found.sequences, lengths, strict=True)]
    completions = [row[n:] for row, n in zip(found.sequences, lengths, strict=True)]

    def pad(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [torch.tensor(row) for row in rows]
        masks = [torch.ones_like(row) for row in tensors]
        side = "left" if left else "right"
        return utils.pad(tensors, 0, side), utils.pad(masks, 0, side)

    (prompt_ids, prompt_mask), (completion_ids, completion_mask) = pad(prompts, True), pad(completions, False)
    shown = [images for images in found.images if images is not None]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.arange(1.0, len(parts) + 1),
        **_over_rows(shown),
        "num_images": [sum(isinstance(part, int) for part in row) for row in parts],
    }


def _over_rows(shown: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """As a processor returns them for all rows: pixels padded to the largest."""
    most = torch.tensor([images["pixel_values"].shape[1:] for images in shown]).amax(dim=0).tolist()
    joined = {key: [images[key] for images in shown] for key in shown[0]}
    joined["pixel_values"] = [
        torch.nn.functional.pad(p, [n for a, b in zip(most[::-1], p.shape[:0:-1], strict=True) for n in (0, a - b)])
        for p in joined["pixel_values"]
    ]
    return {key: torch.cat(values) for key, values in joined.items()}
