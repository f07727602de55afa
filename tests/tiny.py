"""A tokenizer of bytes and a text, for tests that need a whole checkpoint directory."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "".join(f"{n} bottles of beer stand on the wall, and {n * n} crows are watching them. " for n in range(200))


def byte_tokenizer(words: bool = False) -> PreTrainedTokenizerFast:
    """256 tokens, one a byte; of whole texts, or of ``words`` as GPT-2 splits them, which GGUF files can say."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_text(directory: Path) -> Path:
    path = directory / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
