"""A tokenizer of a made-up vocabulary: one token per word, `w0` and so on."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Of `vocab` tokens, two of which are special."""
    words = {word: index for index, word in enumerate([PAD, EOS, *(f"w{i}" for i in range(vocab - 2))])}
    core = Tokenizer(WordLevel(words, unk_token=PAD))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS)


def text(words: list[int]) -> str:
    """The words with these numbers."""
    return " ".join(f"w{word}" for word in words)
