"""GGUF files as checkpoints: config and tokenizer through transformers, tensors dequantised one at a time.

Tensors appear in float32 under the names and in the layout of the transformers model, exactly as transformers' own
loader makes them. Only the tensor that is asked for is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compiler.errors import CheckpointError, first_line
from compiler.ir.types import TensorType
from compiler.weights.checkpoint import Checkpoint
from compiler.weights.gguf_header import Blocks, check_rotary, read_gguf_header
from compiler.weights.plausible import bounded_modules, check_counts
from compiler.weights.tensorfile import read_bytes

_SAMPLE = 4096
_DROPPED = ("_name_or_path", "_model_name_or_path", "quantization_config")


class GgufCheckpoint(Checkpoint):
    """A ``.gguf`` file. Raises CheckpointError when it is damaged or transformers does not know its architecture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self._header = read_gguf_header(path)
        check_counts(self._header.metadata, path)
        check_rotary(self._header, path)
        parts = self._header.metadata.get("split.count", 1)
        if not isinstance(parts, int):
            cause = f"{path.name} is damaged: its split.count is {parts!r}"
            raise CheckpointError(cause, where=str(path), remedy="fetch the file again")
        if parts > 1:
            raise CheckpointError(f"{path.name} is one of {parts} parts", where=str(path), remedy="merge them into one")
        self.config = self._read_config()
        self._check_layers()

    def _check_layers(self) -> None:
        """Every layer has a tensor; transformers takes minutes over thousands that are not there."""
        layers = self.config.get("num_hidden_layers", 0)
        if layers > len(self._header.tensors):
            raise CheckpointError(
                f"{self.path.name} is damaged: it claims {layers} layers and has {len(self._header.tensors)} tensors",
                where=str(self.path),
                remedy="fetch the file again",
            )

    @property
    def types(self) -> Mapping[str, TensorType]:
        return self._types

    @cached_property
    def _types(self) -> dict[str, TensorType]:
        shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        types = {name: TensorType(torch.float32, shapes[name]) for name in self._parts}
        for name, type in types.items():
            held = sum(math.prod(self._header.tensors[part].shape) for part in self._parts[name])
            if held != type.numel:
                raise self._misfit(name, type.shape, f"{held} elements")
        return types

    def _misfit(self, name: str, wanted: tuple[Any, ...], held: str) -> CheckpointError:
        return CheckpointError(
            f"{name} is {list(wanted)} in the model that the metadata describes, the file has {held}",
            where=str(self.path),
            remedy="fetch the file again",
        )

    def read(self, key: str) -> Tensor:
        collected: dict[str, Tensor] = {}
        for name in self._parts[key]:
            result = self._processor.process(
                weights=self._dequantised(self._header.tensors[name]),
                name=name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": collected},
            )
            if result.name is not None:
                collected[key] = torch.from_numpy(np.ascontiguousarray(result.weights))
        value = collected[key]
        if tuple(value.shape) != self.types[key].shape:
            raise self._misfit(key, self.types[key].shape, f"{list(value.shape)}")
        return value if value.dtype == torch.float32 else value.float()

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        (name, *others) = self._parts[key]
        blocks = self._header.tensors[name]
        if others or blocks.shape != self.types[key].shape or not self._stored_as_is(name, blocks):
            return self.read(key)[start:stop].clone()
        width = (blocks.stop - blocks.start) // blocks.shape[0]
        rows = Blocks(
            (stop - start, *blocks.shape[1:]), blocks.format, blocks.start + start * width, blocks.start + stop * width
        )
        return torch.from_numpy(self._dequantised(rows))

    def fingerprint(self) -> str:
        """Covers the header, the file's size, and the first and last bytes of every tensor."""
        tensors = self._header.tensors
        first = min((blocks.start for blocks in tensors.values()), default=0)
        digest = hashlib.sha256(f"{self.path.stat().st_size}".encode())
        digest.update(read_bytes(self.path, 0, first).numpy().data)
        for blocks in tensors.values():
            edge = min(_SAMPLE, blocks.stop - blocks.start)
            digest.update(read_bytes(self.path, blocks.start, blocks.start + edge).numpy().data)
            digest.update(read_bytes(self.path, blocks.stop - edge, blocks.stop).numpy().data)
        return digest.hexdigest()

    def save_tokenizer(self, directory: Path) -> list[Path]:
        from transformers import AutoTokenizer, GenerationConfig

        before = set(directory.iterdir())
        with self._explained("the tokenizer"):
            tokenizer: Any = AutoTokenizer.from_pretrained(
                self.path.parent, gguf_file=self.path.name, trust_remote_code=False
            )
        if self._header.metadata.get("tokenizer.ggml.pre") == "smollm":
            _split_digits(tokenizer)
        tokenizer.save_pretrained(directory)
        GenerationConfig.from_model_config(self._config_object).save_pretrained(directory)
        return sorted(set(directory.iterdir()) - before)

    @cached_property
    def _config_object(self) -> Any:
        from transformers import AutoConfig

        known = {name: value for name, value in self.config.items() if name != "model_type"}
        return AutoConfig.for_model(self.config["model_type"], **known)

    def _read_config(self) -> dict[str, Any]:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        with self._explained("the config"):
            loaded = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name, trust_remote_code=False)
        config = cast(dict[str, Any], shortest_floats(json.loads(loaded.to_json_string())))
        for name in _DROPPED:
            config.pop(name, None)
        if not config.get("architectures"):
            config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
        return config

    @contextmanager
    def _explained(self, part: str) -> Generator[None]:
        """Turn whatever transformers raises while it reads the file into CheckpointError."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as reason:  # the readers of each architecture fail in their own ways
            raise CheckpointError(
                f"transformers cannot read {part} of {self.path.name}: {first_line(reason)}",
                where=str(self.path),
                remedy="start from the original safetensors checkpoint",
            ) from reason

    @cached_property
    def _model(self) -> Any:
        """The model class on the meta device: its names and shapes."""
        import transformers

        with self._explained("the config"), bounded_modules(self.path), torch.device("meta"):
            return getattr(transformers, self.config["architectures"][0])(self._config_object)

    @cached_property
    def _processor(self) -> Any:
        """What undoes the layout changes that writers of GGUF files make for this architecture."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        return TENSOR_PROCESSORS.get(self._header.metadata["general.architecture"], TensorProcessor)(self.config)

    @cached_property
    def _names(self) -> dict[str, str]:
        """From GGUF names (for fused experts also without suffix) to names in the model, as transformers maps them."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        return get_gguf_hf_weights_map(self._model, self._processor)

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """The GGUF tensors that make each tensor of the model. Raises CheckpointError for one that nothing needs."""
        parts: dict[str, list[str]] = {}
        for name in self._header.tensors:
            target = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
            if target is None:
                raise CheckpointError(
                    f"{self._model.__class__.__name__} has no place for tensor {name}",
                    where=str(self.path),
                    remedy="start from the original safetensors checkpoint",
                )
            parts.setdefault(target, []).append(name)
        return parts

    def _stored_as_is(self, name: str, blocks: Blocks) -> bool:
        """Whether transformers takes the tensor as it is, so that its rows are the file's rows."""
        probe = np.broadcast_to(np.float32(-1), blocks.shape)  # one element, whatever its shape
        result = self._processor.process(weights=probe, name=name)
        return result.name is not None and result.weights is probe

    def _dequantised(self, blocks: Blocks) -> NDArray[np.float32]:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        data = read_bytes(self.path, blocks.start, blocks.stop).numpy()
        rows = data.reshape(*blocks.shape[:-1], -1)
        try:
            return dequantize(rows, GGMLQuantizationType(blocks.format)).reshape(blocks.shape)
        except NotImplementedError as reason:
            remedy = "take one in another quantisation"
            raise CheckpointError(first_line(reason), where=str(self.path), remedy=remedy) from reason


def shortest_floats(value: Any) -> Any:
    """``value`` with every float that is a float32 replaced by the shortest decimal that rounds to it.

    GGUF stores floats in 32 bits: what was written as 1e-5 is read as 9.999999747378752e-06.
    """
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    if isinstance(value, dict):
        return {name: shortest_floats(item) for name, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [shortest_floats(item) for item in cast(list[Any], value)]
    return value


def _split_digits(tokenizer: Any) -> None:
    """The `smollm` pre-tokenizer splits digits one by one before bytes; transformers' GGUF reader leaves that out."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
