"""Models, tokenizers and feature extractors as plain transformers loads them, without its chatter."""

from __future__ import annotations

import io
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compiler.errors import CheckpointError, DataError, first_line
from compiler.frontend.sizes import feature_shape
from compiler.weights.checkpoint import check_location, open_checkpoint
from compiler.weights.checkpoint_binding import bind
from compiler.weights.evaluate import evaluate
from compiler.weights.gguf_header import check_rotary, read_gguf_header
from compiler.weights.plausible import check_counts
from compiler.weights.tensorfile import parse_json, read_document

NO_EXTRACTOR = "nothing says how audio features are made for the model"
NO_TOKENIZER = "put the tokenizer's own files (tokenizer.json, …) beside the model"
LOCKED = ("trust_remote_code", "does not recognize this architecture")
EXTRACTOR = "put the preprocessor_config.json of the model beside it"


def load_model(
    path: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, rounding: bool = True
) -> Any:
    """The model in ``path`` as plain transformers loads it, in evaluation mode. Raises CheckpointError.

    Layouts of GPTQ and AWQ are read as the dense weights that they stand for where gptqmodel is not installed.

    Without ``rounding`` a model of compressed-tensors takes activations, and keys and values, as they are.
    """
    import transformers

    location, arguments = location_of(path)
    arguments["trust_remote_code"] = trust_remote_code
    _check_config(Path(location) / "config.json")
    if "gguf_file" in arguments:
        check_rotary(read_gguf_header(Path(path)), Path(path))
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(location, **arguments)
            factory = _model_class(transformers, config)
            quantised = getattr(config, "quantization_config", None) is not None
            if quantised and not rounding:
                config.quantization_config = _weights_alone(config.quantization_config)
            wanted = "auto" if quantised else getattr(torch, dtype)
            if quantised and _lacks_reader(config.quantization_config):
                return _from_codes(factory, config, path, getattr(torch, dtype))
            if "gguf_file" not in arguments:
                arguments["use_safetensors"] = True  # never a pickle
            model = factory.from_pretrained(location, config=config, dtype=wanted, **arguments).eval()
            return _dense(model, getattr(torch, dtype)) if quantised else model
    except CheckpointError:
        raise
    except Exception as reason:  # each class stumbles over a wrong config or file in its own way
        code = _has_code(Path(location) / "config.json")
        locked = not trust_remote_code and code and any(sign in str(reason) for sign in LOCKED)
        raise CheckpointError(
            f"transformers cannot load the model: {first_line(reason)}",
            where=str(path),
            remedy="`--trust-remote-code` runs the Python code that comes with it, if you trust that"
            if locked
            else "load it with transformers alone, and correct what it names",
        ) from reason


def _has_code(file: Path) -> bool:
    """Whether a config names classes that come with the checkpoint."""
    return file.exists() and "auto_map" in (parse_json(read_document(file), file) or {})


def _lacks_reader(quantization: Mapping[str, Any]) -> bool:
    """Whether the package with which transformers reads GPTQ's and AWQ's layouts is not installed."""
    return quantization.get("quant_method") in ("gptq", "awq") and find_spec("gptqmodel") is None


def _from_codes(factory: Any, config: Any, path: str | Path, dtype: torch.dtype) -> Any:
    """The model of a checkpoint of codes, with the weights that they stand for."""
    from compiler.frontend.subject import build_on_meta

    checkpoint = open_checkpoint(path)
    del config.quantization_config
    weights = bind(checkpoint, build_on_meta(config, factory.__name__))
    state = dict(zip(weights, evaluate(list(weights.values()), {"model": checkpoint}), strict=True))
    return factory.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def _weights_alone(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """A config of compressed-tensors that says nothing of activations."""
    groups: Mapping[str, Any] = quantization.get("config_groups", {})
    plain = {name: {**group, "input_activations": None, "output_activations": None} for name, group in groups.items()}
    return {**quantization, "config_groups": plain, "kv_cache_scheme": None}


def _check_config(file: Path) -> None:
    """Raises CheckpointError for a config that transformers would choke on; a hub id has no file yet."""
    if file.exists():
        check_counts(parse_json(read_document(file), file), file)


def _dense(model: Any, dtype: torch.dtype) -> Any:
    """A quantised model with the weights that it computes with, of the dtype it is stored in, cast to ``dtype``."""
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)
    return torch.nn.Module.to(model, dtype)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside (in a ``.gguf``: inside) a model. Raises CheckpointError when there is none."""
    import transformers

    location, arguments = location_of(path)
    arguments["trust_remote_code"] = trust_remote_code
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(location, **arguments)
            empty = len(tokenizer) <= len(tokenizer.all_special_tokens)  # what it makes where there are no files
    except Exception as reason:  # files of a tokenizer are read by many classes, and by a library in Rust
        raise CheckpointError(
            f"transformers finds no tokenizer: {first_line(reason)}", where=str(path), remedy=NO_TOKENIZER
        ) from reason
    if empty:
        raise CheckpointError("the model has no tokenizer", where=str(path), remedy=NO_TOKENIZER)
    return tokenizer


def load_extractor(path: str | Path, config: Any) -> Any:
    """What makes audio features for the model of ``config`` in ``path``: what lies beside it, or its kind's default.

    Raises DataError when neither makes features of the shape that the model takes.
    """
    import transformers

    location, arguments = location_of(path)
    try:
        extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(
            location, trust_remote_code=False, **arguments
        )
    except (OSError, ValueError, KeyError):
        kinds: Any = transformers.FEATURE_EXTRACTOR_MAPPING
        if type(config) not in kinds:
            raise DataError(NO_EXTRACTOR, where=str(path), remedy=EXTRACTOR) from None
        extractor = kinds[type(config)](feature_size=config.num_mel_bins)
    shape = extractor.feature_size, extractor.nb_max_frames
    if shape != feature_shape(config):
        took = " x ".join(map(str, feature_shape(config)))
        made = " x ".join(map(str, shape))
        raise DataError(f"audio features are {made} where the model takes {took}", where=str(path), remedy=EXTRACTOR)
    return extractor


@contextmanager
def quiet() -> Generator[None]:
    """Without the progress bars and advice of transformers, which would break our own lines.

    Its GGUF reader shows a bar that has no switch, hence the diverted standard error.
    """
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def location_of(path: str | Path) -> tuple[str, dict[str, Any]]:
    """The directory or hub id to load from, and what else transformers is told. Raises CheckpointError for neither."""
    check_location(path)
    path = Path(path)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    return str(path), {}


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the config names; otherwise, and for classes that come with the checkpoint, an auto class."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    auto_map: dict[str, str] = getattr(config, "auto_map", {})
    names = [name for name in auto_map if name.startswith("AutoModel")]
    named = [name for name in names if auto_map[name].rpartition(".")[2] in (config.architectures or ())]
    return next((getattr(transformers, name) for name in (*named, *names)), transformers.AutoModelForCausalLM)
