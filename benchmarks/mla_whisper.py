"""Half the cache of Whisper's decoder: ours and published conversions on the same speech, in one run.

``python benchmarks/mla_whisper.py --cache 50% 25%`` converts the decoder's self-attention in Whisper tiny.en by every
method to the same cached values per token and layer. Without rotary positions TransMLA is its joint component analysis
of keys and values, with keys scaled to the values' size, and whitened low rank is one of keys and one of values; both
come down to other key and value projections, which plain transformers runs.

Calibration: what the original writes of synthetic voices that read Emma. Scores: loss of what the original writes
above the original's own, KL(original || converted), agreement on the most likely token, and the share of recordings of
which the converted model, writing greedily, writes the original's transcript to the last token; on recordings of
people, and of other voices that read Persuasion. ``python benchmarks/fetch.py whisper speech`` gets model and speech.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.common import ROOT, show
from benchmarks.peers_mla import transmla
from benchmarks.peers_mla.attention import leading
from compiler.datafiles import recordings
from compiler.evaluate.data import data_windows
from compiler.evaluate.inputs import Window
from compiler.evaluate.loading import load_model
from compiler.evaluate.texts import TextData
from compiler.frontend import capture
from compiler.ir.execute import run
from compiler.ir.graph import Graph
from compiler.pipeline import Pipeline
from passes import GqaToMla

MODEL = ROOT / "models" / "whisper"
SPEECH = ROOT / "data" / "speech"
LENGTH = 128
STATES = "encoder_states"
Logits = Callable[[Window], Tensor]


@dataclass(frozen=True)
class Score:
    """Means over positions of the original's transcripts, in nats, and ``same``, the share of equal transcripts."""

    loss: float
    kl: float
    agreement: float
    same: float


def whitened(moment: Tensor, cache: int) -> Tensor:
    """What is left of keys beside values, a projector [2 D, 2 D] from their second moment: each by itself."""
    width = len(moment) // 2
    bases = [leading(part, cache // 2) for part in (moment[:width, :width], moment[width:, width:])]
    return torch.block_diag(*[basis @ basis.T for basis in bases])


def joint(moment: Tensor, cache: int) -> Tensor:
    """The same for TransMLA's latent, nothing of which is rotary here."""
    basis = torch.eye(len(moment) // 2, dtype=moment.dtype)
    return transmla.projector(moment, basis, 0, cache)


PEERS = {"TransMLA": joint, "whitened low rank": whitened}


def moments(model: Any, windows: Sequence[Window]) -> list[Tensor]:
    """E[x xᵀ] of keys beside values of every self-attention of the decoder, not divided by the count."""
    layers = model.model.decoder.layers
    seen: dict[Any, Tensor] = {}
    parts = [part for layer in layers for part in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    hooks = [part.register_forward_hook(lambda part, _, made: seen.update({part: made[0]})) for part in parts]
    width = 2 * model.config.d_model
    totals = [torch.zeros(width, width, dtype=torch.float64) for _ in layers]
    for window in windows:
        logits_of(model)(window)
        for total, layer in zip(totals, layers, strict=True):
            rows = torch.cat([seen[layer.self_attn.k_proj], seen[layer.self_attn.v_proj]], dim=-1).double()
            total += rows.T @ rows
    for hook in hooks:
        hook.remove()
    return totals


def projected(model: Any, totals: Sequence[Tensor], method: Callable[[Tensor, int], Tensor], cache: int) -> Logits:
    """``model`` with key and value projections through what ``method`` leaves of ``cache`` numbers."""
    model = copy.deepcopy(model)
    for layer, total in zip(model.model.decoder.layers, totals, strict=True):
        left = method(total, cache).T.float()  # rows times the projector
        attention = layer.self_attn
        weight = left @ torch.cat([attention.k_proj.weight, attention.v_proj.weight])
        bias = left @ torch.cat([torch.zeros_like(attention.v_proj.bias), attention.v_proj.bias])
        width = len(weight) // 2
        attention.k_proj.weight.data, attention.v_proj.weight.data = weight[:width], weight[width:]
        attention.v_proj.bias.data = bias[width:]  # that of the keys moves all scores of a query alike
    return logits_of(model)


def decoder_alone() -> Graph:
    """The graph of the decoder, whose second input is what the encoder, which no method touches, makes."""
    graph = capture(MODEL)
    made = graph.outputs.pop("encoder_last_hidden_state")
    graph.replace(made, graph.add_input(STATES, made.type))
    del graph.inputs["input_features"]
    graph.prune()
    return graph


def ours(share: float, windows: Sequence[Window]) -> Logits:
    """The pass itself; what it writes computes what the graph does."""
    graph = decoder_alone()
    batches = [_given(window) for window in windows]
    started = time.process_time()
    (entry,) = Pipeline([GqaToMla(cache=share)]).run(graph, calibration=lambda _: batches).passes
    what = entry.rewritten[0]
    print(f"ours: {what.what}; queries {what.numbers['query_rows_after']:.0f}; {time.process_time() - started:.0f} s")
    return lambda window: run(graph, _given(window))["logits"][0]


def _given(window: Window) -> dict[str, Tensor]:
    return {name: window.arguments[name] for name in (STATES, "decoder_input_ids")}


def logits_of(model: Any) -> Logits:
    """Its decoder's."""

    def compute(window: Window) -> Tensor:
        states = BaseModelOutput(last_hidden_state=window.arguments[STATES])
        with torch.inference_mode():
            ids = window.arguments["decoder_input_ids"]
            return model(encoder_outputs=states, decoder_input_ids=ids, use_cache=False).logits[0]

    return compute


def heard(model: Any, data: TextData) -> list[Window]:
    """What ``model`` writes of recordings, and what its encoder makes of them."""
    states: list[Tensor] = []
    hook = model.model.encoder.register_forward_hook(lambda _, given, made: states.append(made[0]))
    windows = data_windows(model, MODEL, data)
    hook.remove()
    pairs = zip(windows, states, strict=True)
    return [replace(window, arguments={**window.arguments, STATES: state}) for window, state in pairs]


def score(original: Logits, converted: Logits, windows: Sequence[Window], suppressed: Sequence[int]) -> Score:
    """``suppressed`` tokens are never written."""
    rows = [_score(original(window), converted(window), window.ids, suppressed) for window in windows]
    total = torch.tensor([row[:4] for row in rows], dtype=torch.float64).sum(0)
    loss, kl, agreement = (total[:3] / total[3]).tolist()
    return Score(loss, kl, agreement, sum(row[4] for row in rows) / len(rows))


def _score(reference: Tensor, found: Tensor, ids: Tensor | None, suppressed: Sequence[int]) -> tuple[float, ...]:
    assert ids is not None  # windows of encoder-decoders have them
    ours, theirs = found.double().log_softmax(-1)[:-1], reference.double().log_softmax(-1)[:-1]
    loss = functional.nll_loss(ours, ids[1:], reduction="sum") - functional.nll_loss(theirs, ids[1:], reduction="sum")
    kl = (theirs.exp() * (theirs - ours)).sum()
    found, reference = found.clone(), reference.clone()
    found[:, suppressed] = reference[:, suppressed] = -torch.inf
    alike = (found.argmax(-1) == reference.argmax(-1))[1:]  # the first tokens are given
    return float(loss), float(kl), float(alike.sum()), float(len(alike)), float(alike.all())


def converted(cache: Sequence[float], model: Any, windows: Sequence[Window]) -> Iterator[tuple[float, str, Logits]]:
    totals = moments(model, windows)
    for share in cache:
        for name, method in PEERS.items():
            yield share, name, projected(model, totals, method, int(share * 2 * model.config.d_model))
        yield share, "ours", ours(share, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", nargs="+", type=lambda text: float(text.strip("%")) / 100, default=[0.5])
    parser.add_argument("--samples", type=int, default=64, help="clips to calibrate on")
    parser.add_argument("--score", type=int, default=24, help="clips of each kind to score on, at most")
    given = parser.parse_args()
    model = load_model(MODEL)
    suppressed = model.generation_config.suppress_tokens

    def clips(name: str, samples: int) -> list[Window]:
        return heard(model, TextData(SPEECH / name, min(samples, len(recordings(SPEECH / name))), LENGTH))

    texts = {name: clips(name, given.score) for name in ("people", "persuasion")}
    rows = [["cache", "method", *(f"{name}: {what}" for name in texts for what in ("loss", "KL", "agrees", "same"))]]
    for share, name, logits in converted(given.cache, model, clips("emma", given.samples)):
        found = [score(logits_of(model), logits, windows, suppressed) for windows in texts.values()]
        numbers = [[f"{s.loss:+.3f}", f"{s.kl:.3f}", f"{s.agreement:.1%}", f"{s.same:.0%}"] for s in found]
        rows.append([f"{share:.0%}", name, *(number for each in numbers for number in each)])
        print(" ".join(rows[-1]), flush=True)
    show(f"Whisper tiny.en, {given.samples} clips of calibration", rows)


if __name__ == "__main__":
    main()
