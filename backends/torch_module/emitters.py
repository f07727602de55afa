"""What a person would write for each operation: one table, from operation to a torch expression.

An emitter sees the operation (``Site``) and its operands as code, and returns an expression. Those of operations on one
tensor or two are in ``tensor_emitters``. Operations on several tensors at once (attention, experts) call functions of
``templates/``, which ``Site.helper`` adds to the module.
"""

from __future__ import annotations

from backends.torch_module.code import Code, number
from backends.torch_module.site import Emitter, Site, arg, optional
from backends.torch_module.tensor_emitters import TENSOR_EMITTERS
from compiler.errors import TargetError


def _linear(site: Site) -> Code:
    first = site.node.input(0).node
    if first is not None and first.op.name == "linear" and first.optional_input(2) is None:
        down, up = site.dense(first), site.dense(site.node)
        made = arg(site, 0).text
        if down and up and made.startswith(f"{down}("):  # written where it is used, as nothing else uses it
            inner = made.removeprefix(f"{down}(").removesuffix(")")
            return Code(f"{site.helper('low_rank')}({inner}, {down}, {up})")
    return _leaf_or(site, "F.linear")


def _leaf_or(site: Site, function: str) -> Code:
    leaf = site.leaf()
    if leaf:
        return Code(f"{leaf}({arg(site, 0).text})")
    given = [optional(site, index) for index in range(len(site.args))]
    return Code(f"{function}({', '.join(text for text in given if text)})")


def _embedding(site: Site) -> Code:
    leaf = site.leaf()
    ids = arg(site, 1).text
    return Code(f"{leaf}({ids})" if leaf else f"F.embedding({ids}, {arg(site, 0).text})")


def _rms_norm(site: Site) -> Code:
    offset, weight = site.node.attr("offset"), optional(site, 1)
    return _norm(site, "F.rms_norm", f"{number(offset)} + {weight}" if weight and offset else weight)


def _layer_norm(site: Site) -> Code:
    return _norm(site, "F.layer_norm", optional(site, 1), optional(site, 2))


def _norm(site: Site, function: str, weight: str | None, bias: str | None = None) -> Code:
    """A module that holds the vectors, or a call with those that are computed."""
    leaf, x = site.leaf(), arg(site, 0)
    if leaf:
        return Code(f"{leaf}({x.text})")
    vectors = [f"{name}={text}" for name, text in (("weight", weight), ("bias", bias)) if text]
    options = [*vectors, f"eps={site.node.attr('eps')}"]
    return Code(f"{function}({x.text}, {x.atom}.shape[-1:], {', '.join(options)})")


def _hadamard(site: Site) -> Code:
    return Code(f"{site.helper('hadamard')}({arg(site, 0).text})")


def _conv(site: Site) -> Code:
    leaf = site.leaf()
    if not leaf:
        raise TargetError("a generated module has no convolution with a computed kernel", where=site.node.scope)
    return Code(f"{leaf}({arg(site, 0).text})")


def _rope_table(site: Site) -> Code:
    leaf = site.leaf()
    if not leaf:
        raise TargetError("a generated module has no rotary table with computed frequencies", where=site.node.scope)
    return Code(f"{leaf}({arg(site, 0).text})")


ROTATIONS = {
    "half": "apply_rotary",
    "interleaved": "apply_interleaved_rotary",
    "interleaved-to-half": "apply_interleaved_rotary_to_half",
}


def _rope(site: Site) -> Code:
    function = site.helper(ROTATIONS[site.node.attr("layout")])
    return Code(f"{function}({', '.join(arg(site, index).text for index in range(3))})")


def _attention(site: Site) -> Code:
    """Operands after those of the operation: the mask of the model, the cache (which has been read already)."""
    mask = optional(site, 6)
    options = [f"{name}={text}" for name, index in (("bias", 4), ("sinks", 5)) if (text := optional(site, index))]
    softcap = site.node.attr("softcap")
    if softcap:
        options.append(f"softcap={number(softcap)}")
    causal = site.node.attr("causal")
    options += [] if causal or not options else ["causal=False"]
    rounded = [f"bits={site.bits}", f"value_size={site.size('value')}"] if site.bits and causal else []
    function = site.helper("eager_attention" if options else "attention" if causal else "full_attention")
    shown = [arg(site, index).text for index in range(3)]
    return Code(f"{function}({', '.join([*shown, mask or 'None', site.size('scale'), *options, *rounded])})")


def _latent_attention(site: Site) -> Code:
    function = site.helper("latent_attention")
    up = site.weight() or arg(site, 3).text
    shown = [arg(site, 0).text, arg(site, 1).text, optional(site, 2) or "None", up, optional(site, 5) or "None"]
    softcap = site.node.attr("softcap")
    options = [site.rotation, site.bits, site.size("rotated")] if site.bits else []
    options += [f"softcap={number(softcap)}"] if softcap else []
    return Code(f"{function}({', '.join([*shown, site.size('scale'), *options])})")


ACTIVATIONS = {"silu": "F.silu", "gelu": "F.gelu", "gelu_tanh": "gelu_tanh", "relu": "F.relu"}


def _experts(site: Site) -> Code:
    biased = site.args[5:7] and any(part is not None for part in site.args[5:7])
    activation: str = site.node.attr("activation")
    shown = [arg(site, index).text for index in range(5)]
    if activation == "clamped_swish":
        function = site.helper("run_clamped_experts")
        biases = [optional(site, 5) or "None", optional(site, 6) or "None"]
        extra = [*biases, number(site.node.attr("alpha")), number(site.node.attr("limit"))]
    else:
        function = site.helper("run_experts")
        name = ACTIVATIONS[activation]
        extra = [name if name.startswith("F.") else site.helper(name)]
        if biased:
            raise TargetError(f"a generated module has no experts with biases and {activation}", where=site.node.scope)
    return Code(f"{function}({', '.join([*shown, *extra])})")


EMITTERS: dict[str, Emitter] = {
    **TENSOR_EMITTERS,
    "linear": _linear,
    "embedding": _embedding,
    "hadamard": _hadamard,
    "conv": _conv,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "rope_table": _rope_table,
    "rope": _rope,
    "attention": _attention,
    "latent_attention": _latent_attention,
    "experts": _experts,
}
"""What is written for each operation. A test holds that every operation of the graph is here."""
