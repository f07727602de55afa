"""Causal language models: a stack of layers over tokens, a head, and a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.torch_module.assembly import CachedAssembly
from backends.torch_module.caches import first_cached, window_config
from backends.torch_module.code import names_in
from backends.torch_module.model import Model
from backends.torch_module.model_code import TopWriter, without_call
from backends.torch_module.program import ATTENTION, Body, Loop
from backends.torch_module.rendering import mapping, render, strings
from backends.torch_module.stages import Staged
from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.positions import POSITIONS


class CausalAssembly(CachedAssembly):
    """``inner`` is the part from tokens to hidden states, ``loop`` its stack."""

    auto_classes: Mapping[str, str] = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}

    def __init__(
        self, graph: Graph, model: Model, name: str, program: Body, inner: Body, loop: Loop, staged: Staged | None
    ) -> None:
        super().__init__(graph, model, name, program)
        self.inner = inner
        self.loop = loop
        self.staged = staged

    def written_at_top(self) -> list[Body]:
        return [self.inner]

    def own_config(self) -> dict[str, Any]:
        windows = [self._window(layer) for layer in self.loop.layers]
        bits = {"cache_bits": self.model.cache_bits} if self.model.cache_bits else {}
        return {"use_cache": True, **window_config(windows), **bits}

    def _window(self, layer: Body) -> int | None:
        """None where it sees all tokens before, 0 where it does not attend."""
        found = [item for body in layer.walk() for item in body.items if isinstance(item, Node)]
        windows = [node.attr("window") for node in found if node.op.name in ATTENTION]
        if len(windows) > 1:
            raise TargetError(
                f"{layer.path} attends {len(windows)} times, which a generated module's cache cannot hold"
            )
        return windows[0] or None if windows else 0

    def top(self) -> str:
        extras, prefix = self.model.extras, self.model.prefix
        tokens = self.graph.inputs["input_ids"]
        names = {tokens: "input_ids", self.graph.inputs[POSITIONS]: POSITIONS, extras.cache: "past_key_values"}
        names |= dict.fromkeys(extras.masks.values(), "mask")
        names |= {self.staged.present: "present", self.staged.lengths: "lengths"} if self.staged else {}
        node = self._embedded()
        names |= {node.output: "hidden_states"} if node else {}
        body = TopWriter(self.model, self.inner, names, "hidden_states" if node else "input_ids")
        lines, result = body.statements()
        before = self._before(lines, body.tokens)
        head = TopWriter(self.model, without_call(self.program, "model"), {self.inner.outputs[0]: "hidden_states"})
        head_lines, head_result = head.statements()
        body_init, head_init = body.init_statements(), head.init_statements()
        layers = sorted({f"{prefix}{self.model.classes[layer.path].name}" for layer in self.loop.layers})
        return render(
            "causal_lm.py.jinja",
            prefix=prefix,
            binaries="kernel_binary" in self.model.helpers,
            staged=self.staged is not None,
            no_split=strings(layers),
            layers=", ".join(layers),
            stacked=self.stacked,
            rotary="RotaryEmbedding" in self.model.helpers,
            rotation="LatentRotation" in self.model.helpers,
            bare=self.bare_classes(),
            body_init=body_init,
            body_forward=[*before, *lines],
            body_result=result,
            embedding=self._embedding(tokens),
            embeds=node is not None,
            head_init=head_init,
            head_forward=head_lines,
            head_result=head_result,
            head=self._head(),
            masks=self._masks('given["inputs_embeds"]', 'given["past_key_values"]'),
            masks_type="dict[int | None, Any]" if len(extras.masks) > 1 else "torch.Tensor | None",
            tied=mapping(self.tied_tensors),
            tied_inside=mapping(self.tied_inside()),
        )

    def _embedded(self) -> Node | None:
        """What makes vectors of tokens, where nothing else in the model looks at tokens."""
        (node, *others) = self.graph.inputs["input_ids"].users
        alone = not others and node.op.name == "embedding" and node in self.inner.items
        return node if alone and node in self.model.layout.leaves else None

    def _before(self, lines: list[str], tokens: str) -> list[str]:
        """Statements that make positions and the mask; ``tokens`` have the length."""
        found: list[str] = []
        if "position_ids" in names_in("\n".join(lines)):
            self.model.helpers.add("token_positions")
            found += [
                "if position_ids is None:",
                f"    position_ids = token_positions({tokens}, attention_mask, past_key_values)",
            ]
        if self.staged:
            self.model.helpers.add("present_tokens")
            found += [
                f"present = present_tokens({tokens}, attention_mask, past_key_values)",
                "lengths = present.sum(1)",
            ]
        masks = self._masks(tokens, "past_key_values")
        return [*found, f"{'mask' if len(self.model.extras.masks) == 1 else 'masks'} = {masks}"]

    def _masks(self, tokens: str, cache: str) -> str:
        """The mask of all layers, or those of each window, as code."""
        known, masks = f"{tokens}, attention_mask, {cache}", self.model.extras.masks
        if len(masks) > 1:
            self.model.helpers.add("causal_masks")
            return f"causal_masks({known}, self.config.attention_windows)"
        first = first_cached(self.graph)
        return f"causal_mask({known}{'' if 0 in masks else f', {first}, self.config.attention_windows[{first}]'})"

    def _embedding(self, tokens: Value) -> str:
        node = next((user for user in tokens.users if user.op.name == "embedding"), None)
        leaf = self.model.layout.leaves.get(node) if node else None
        return leaf.path.removeprefix("model.") if leaf else ""
