"""What is written for operations on which tokens go on: calls of functions of ``templates/tokens.py.jinja``."""

from __future__ import annotations

from backends.torch_module.code import Code
from backends.torch_module.emitters import Emitter, Site, arg, optional
from backends.torch_module.stages import count_code


def _called(site: Site, helper: str, *options: str) -> Code:
    given = [text for index in range(len(site.args)) if (text := optional(site, index))]
    return Code(f"{site.helper(helper)}({', '.join([*given, *(option for option in options if option)])})")


def _scores(site: Site) -> Code:
    """Of prompts, the operand behind those of the operation says which tokens are there."""
    node = site.node
    rows = f'rows="{node.attr("rows")}"' if node.attr("rows") != "all" else ""
    step = f"step={node.attr('step')}" if node.attr("step") != 1 else ""
    causal = "causal=True" if node.attr("causal") and not rows else ""
    return _called(
        site, "token_scores" if len(site.args) == 2 else "prompt_scores", site.size("scale"), rows, step, causal
    )


def _blocks(site: Site) -> Code:
    """Of prompts, the second operand says which tokens are there."""
    return _called(site, "block_scores", f"size={site.node.attr('size')}")


def _ends(site: Site) -> list[str]:
    return [f"{name}={site.node.attr(name)}" if site.node.attr(name) else "" for name in ("prefix", "suffix")]


def _select(site: Site) -> Code:
    if len(site.args) > 1:  # of a prompt: which tokens are there, and how many of each sample
        scores, present, lengths = (arg(site, index).text for index in range(3))
        count = count_code(site.node.attr("keep"), lengths)
        given = [scores, present, count, "past_key_values", "self.layer_idx", *filter(None, _ends(site))]
        return Code(f"{site.helper('select_prompt_tokens')}({', '.join(given)})")
    return _called(site, "select_tokens", site.size("keep"), *_ends(site))


def _match(site: Site) -> Code:
    return _called(site, "match_tokens", site.size("keep"), *_ends(site))


def _take(site: Site) -> Code:
    axis = site.node.attr("axis") % site.node.input(0).type.rank
    return _called(site, "take_tokens", f"axis={axis}" if axis != 1 else "")


def _merge(site: Site) -> Code:
    return _called(site, "merge_tokens")


def _restore(site: Site) -> Code:
    return _called(site, "restore_tokens" if len(site.args) == 5 else "restore_prompt_tokens")


TOKEN_EMITTERS: dict[str, Emitter] = {
    "token_scores": _scores,
    "token_blocks": _blocks,
    "token_select": _select,
    "token_match": _match,
    "token_take": _take,
    "token_merge": _merge,
    "token_restore": _restore,
}
