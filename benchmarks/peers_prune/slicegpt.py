"""SliceGPT (arXiv 2401.15024): the residual stream is rotated to its principal components and cut.

Norms are folded into what reads them. Before every attention and MLP, Q holds the principal components of the normed
stream there, of the model as cut so far; readers become W Q, writers Qᵀ W, and what passes a block by is multiplied by
Q_lᵀ Q_{l+1}, which is stored. The table and the head become two matrices. All of these numbers are counted, so that
a small model with a tied table holds more of them than before when it is cut as published, by 1 - keep and not at the
head: `cut`. With `keep` all of it, the head too, is cut until it holds as few as that asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import Peer, Row, linear_numbers, numbers
from benchmarks.peers_prune.parts import counted, layers_of


class Norm(nn.Module):
    """x / sqrt(Σ x² / width + eps) with the ``width`` from before the cut."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.width + self.eps)


class Sliced(nn.Module):
    """A layer whose residual stream is cut, with the matrices that pass the blocks by."""

    def __init__(self, layer: Any, norm: Norm, shortcuts: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = layer.self_attn, layer.mlp, norm
        self.past_attention, self.past_mlp = (nn.Parameter(each, requires_grad=False) for each in shortcuts)

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        x = x @ self.past_attention + self.self_attn(hidden_states=self.norm(x), **arguments)[0]
        return x @ self.past_mlp + self.mlp(self.norm(x))


def settings(keep: float, model: Any) -> list[Row]:
    return [{"cut": round(1 - keep, 6)}, {"keep": keep}]


def calibrate(model: Any, windows: Tensor) -> Tensor:
    """Every width is calibrated on its own, as published: see ``apply``."""
    return windows


def apply(model: Any, windows: Tensor, cut: float | None = None, keep: float = 1.0) -> None:
    width = model.config.hidden_size
    size = width_for(model, keep) if cut is None else round(width * (1 - cut))
    fold(model)
    norm = Norm(width, model.config.rms_norm_eps)
    streams = [model.base_model.embed_tokens(ids[None]) for ids in windows]
    arguments = given_to_layers(model, windows[:1])
    basis = components(streams, norm, size)
    table = model.base_model.embed_tokens
    table.weight = nn.Parameter(table.weight @ basis, requires_grad=False)
    streams = [x @ basis for x in streams]
    sliced: list[nn.Module] = []
    for layer in layers_of(model):
        read(layer.self_attn, ("q_proj", "k_proj", "v_proj"), basis)
        streams = [x @ basis.T + layer.self_attn(hidden_states=norm(x), **arguments)[0] for x in streams]
        middle = components(streams, norm, size)
        write(layer.self_attn.o_proj, middle)
        read(layer.mlp, ("gate_proj", "up_proj"), middle)
        streams = [x @ middle for x in streams]
        streams = [x @ middle.T + layer.mlp(norm(x)) for x in streams]
        last = cut is not None and layer is layers_of(model)[-1]
        after = components(streams, norm, width if last else size)
        write(layer.mlp.down_proj, after)
        streams = [x @ after for x in streams]
        sliced.append(Sliced(layer, norm, (basis.T @ middle, middle.T @ after)))
        basis = after
    model.base_model.layers = nn.ModuleList(sliced)
    model.base_model.norm = norm
    read(model, ("lm_head",), basis)


def width_for(model: Any, keep: float) -> int:
    """The greatest width at which all of the model's numbers are as few as ``keep`` of the linear maps asks for."""
    goal = numbers(model) - (1 - keep) * linear_numbers(model)
    full, layers, vocabulary = model.config.hidden_size, len(layers_of(model)), model.config.vocab_size
    row = linear_numbers(model) / full + 2 * vocabulary
    return max(width for width in range(1, full + 1) if width * row + 2 * layers * width**2 <= goal)


def fold(model: Any) -> None:
    """Norm scales into what reads them; the head gets a table of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    pairs = [(model.base_model.norm, [model.lm_head])]
    for layer in layers_of(model):
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    for norm, readers in pairs:
        for linear in readers:
            linear.weight.mul_(norm.weight)
        norm.weight.fill_(1)


def given_to_layers(model: Any, window: Tensor) -> dict[str, Any]:
    """What the model gives its layers beside the stream, for windows of this length."""
    seen: dict[str, Any] = {}
    hook = layers_of(model)[0].register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    model.base_model(input_ids=window, use_cache=False)
    hook.remove()
    return seen


def components(streams: list[Tensor], norm: Norm, count: int) -> Tensor:
    """The first ``count`` principal components of the normed streams, [width, count]."""
    second = torch.zeros(norm.width, norm.width, dtype=torch.float64)
    for stream in streams:
        rows = norm(stream)[0].double()
        second += rows.T @ rows
    return torch.linalg.eigh(second).eigenvectors.flip(1)[:, :count].float()


def read(owner: Any, names: tuple[str, ...], basis: Tensor) -> None:
    for name in names:
        linear = getattr(owner, name)
        linear.weight = nn.Parameter(linear.weight @ basis, requires_grad=False)


def write(linear: nn.Linear, basis: Tensor) -> None:
    linear.weight = nn.Parameter(basis.T @ linear.weight, requires_grad=False)


PEER = Peer(calibrate, counted(apply), settings)
