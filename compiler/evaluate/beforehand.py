"""What of an evaluation cannot work, found before anything is computed: metrics and data that do not fit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compiler.datafiles import kind_of, taken
from compiler.evaluate.data import check_windows
from compiler.evaluate.inputs import is_causal, is_paired
from compiler.evaluate.metrics import METRICS, Situation, choose
from compiler.evaluate.texts import TextData
from compiler.frontend.sizes import input_names


def situation_of(model: Any, *, compared: bool, data: Path | None, items: bool) -> Situation:
    """What decides which metrics fit ``model``, of which no weight is read."""
    takes = taken(input_names(model))
    return Situation(
        model=type(model).__name__,
        takes=takes,
        causal=is_causal(model),
        paired=is_paired(model),
        generates=model.can_generate(),
        compared=compared,
        data="" if data is None else kind_of(data, takes),
        items=items,
    )


def check_metrics(
    architecture: str, config: Mapping[str, Any], metrics: Sequence[str] | None, data: Path, items: bool
) -> None:
    """Raises DataError when one of ``metrics`` does not fit a model of this class, compared on ``data``."""
    model = _without_weights(architecture, config)
    choose(metrics, situation_of(model, compared=True, data=data, items=items))


def check_comparison(
    path: str | Path,
    architecture: str,
    config: Mapping[str, Any],
    metrics: Sequence[str] | None,
    data: TextData,
    *,
    image: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Raises DataError when the model in ``path``, of this class and config, cannot be given ``data``."""
    model = _without_weights(architecture, config)
    names = choose(metrics, situation_of(model, compared=True, data=data.data, items=True))
    if any(METRICS[name].needs in ("windows", "text") for name in names):
        check_windows(model, path, data, image=image, trust_remote_code=trust_remote_code)


def _without_weights(architecture: str, config: Mapping[str, Any]) -> Any:
    from compiler.frontend.subject import build_on_meta, config_from_dict

    return build_on_meta(config_from_dict(config), architecture)
