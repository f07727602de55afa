"""A tiny Llama checkpoint with a tokenizer on disk, for tests of the whole job."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import byte_tokenizer, write_text


def write_model(directory: Path, seed: int = 0, layers: int = 2, **changes: object) -> Path:
    """A random bfloat16 Llama in ``directory``; ``changes`` are options of its config."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = {**sizes, "vocab_size": 256, "max_position_embeddings": 256, "tie_word_embeddings": False, **changes}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **options))
    model.to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_recipe(
    directory: Path, passes: str = "[]", rest: str = "", name: str = "recipe.yaml", model: str = "tiny"
) -> Path:
    """A recipe for ``model``, beside it in ``directory``."""
    path = directory / name
    path.write_text(f"model: {model}\npasses: {passes}\n{rest}", encoding="utf-8")
    return path


def write_folder(directory: Path, **changes: object) -> Path:
    """A folder with the model ``tiny`` and the text ``text.txt`` in it."""
    write_model(directory / "tiny", **changes)
    write_text(directory)
    return directory
