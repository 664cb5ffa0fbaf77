"""Rows as verl's own agent loop makes them of token ids and images, by a local processor."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

from dta_plugin.models.introspection import decoder_of
from tests.adapters.verl.support import END, PLACE, START, VIDEO, VOCABULARY

_MARKS = {"<|image_pad|>": PLACE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}


class _Processor(Qwen2_5_VLProcessor):
    """With a stand-in for videos, whose own class needs torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


def _processor(model: Any) -> Qwen2_5_VLProcessor:
    """A token per word; `get_rope_index` is the model's, bound as verl binds it."""
    words = {f"w{i}": i for i in range(VOCABULARY)} | _MARKS
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", extra_special_tokens=list(_MARKS))
    size = {"shortest_edge": 64, "longest_edge": 4096}
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    found: Any = _Processor(images, tokenizer, SimpleNamespace(merge_size=2, model_input_names=[]))
    found.config = model.config
    kind = type(decoder_of(model))
    for name in ("get_rope_index", "get_vision_position_ids"):
        setattr(found, name, MethodType(getattr(kind, name), found))
    return found


def image(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def row(model: Any, ids: list[int], images: list[Image.Image]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`multi_modal_inputs` and positions [4, len] of a rollout."""
    processor = _processor(model)
    worker: Any = SimpleNamespace(processor=processor, tokenizer=processor.tokenizer)
    worker._get_mm_processor_kwargs = lambda _: {}
    output = SimpleNamespace(multi_modal_data={"images": images} if images else None, mm_processor_kwargs=None)
    tokens = torch.tensor(ids)
    inputs = AgentLoopWorker._compute_multi_modal_inputs(worker, output, tokens)
    ones = torch.ones_like(tokens)[None]
    return inputs, AgentLoopWorker._compute_position_ids(worker, tokens[None], ones, inputs)[0]
