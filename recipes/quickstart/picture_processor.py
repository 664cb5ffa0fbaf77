"""`Qwen3VLProcessor` without videos, and so without torchvision: for the image quickstart's tiny Qwen3-VL and Qwen3.5.

`save_pretrained` copies this file into the model's folder, where `AutoProcessor` finds it with `trust_remote_code`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor


class PictureProcessor(Qwen3VLProcessor):
    """Makes of pictures and text what `Qwen3VLProcessor` makes of them."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
        for name, token in (tokens | {end: f"<|{end}|>" for end in ("vision_start", "vision_end")}).items():
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(cls, _: str, folder: str, **kwargs: Any) -> PreTrainedTokenizerFast:
        """Not with `AutoTokenizer`, which has a class of its own for Qwen3.5, that splits text in another way."""
        return PreTrainedTokenizerFast.from_pretrained(folder, **kwargs)
