"""How many tokens remain behind each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from compiler.errors import PassError
from compiler.ir.ops.tokens import mergeable
from compiler.ir.types import Dim, canonical_dim

Keep = float | int | Sequence[float | int]
FINEST = 1000  # parts of symbolic lengths are fractions with no larger denominator


def counts(tokens: Dim, keep: Keep, steps: int, least: int) -> list[Dim]:
    """What remains of ``tokens`` after each of ``steps``; at least ``least``, where there are as many.

    Raises PassError for a list of another length, one that grows, and a number in steps of an unknown length.
    """
    if isinstance(keep, Sequence):
        if len(keep) != steps:
            cause = f"`keep` says what remains behind {len(keep)} layers, and there are {steps}"
            raise PassError(cause, option="keep", remedy="name as many `layers`")
        _check_list(keep, tokens)
        found = [_count(tokens, part, least) for part in keep]
    elif isinstance(keep, int) and isinstance(tokens, str) and steps > 1:
        cause = "a number of tokens cannot be reached in steps where their length is not known"
        raise PassError(cause, option="keep", remedy="write a part, or a list with a number for each layer")
    elif isinstance(keep, int):
        found = [_count(tokens, _between(tokens, keep, step, steps), least) for step in range(1, steps + 1)]
    else:
        found = [_count(tokens, 1 - (1 - keep) * step / steps, least) for step in range(1, steps + 1)]
    sizes = [size for size in (tokens, *found) if isinstance(size, int)]
    if sizes != sorted(sizes, reverse=True):
        raise PassError(
            f"behind its layers {', '.join(map(str, sizes[1:]))} of {sizes[0]} tokens cannot remain",
            option="keep",
            remedy="each layer may keep at most what the one before keeps: raise later numbers of `keep`",
        )
    return found


def _check_list(keep: Sequence[float | int], tokens: Dim) -> None:
    """Raises PassError where the list grows, or is of parts and of numbers, which compare at known lengths alone."""
    if len({isinstance(part, int) for part in keep}) > 1:
        if isinstance(tokens, int):
            return
        cause = "a list of parts and of numbers of tokens grows at some lengths"
        raise PassError(cause, option="keep", remedy="write parts alone, as `1.0`, or numbers alone")
    if list(keep) != sorted(keep, reverse=True):
        cause = f"behind its layers {', '.join(map(str, keep))} cannot remain: tokens do not come back"
        raise PassError(cause, option="keep", remedy="write numbers that fall")


def paired(tokens: str, keep: Keep, steps: int, prefix: int, suffix: int) -> list[Dim]:
    """What remains after each of ``steps`` where of a pair of neighbours one can go: a part of the pairs does.

    So a sample never lacks padding that goes where longer ones lose tokens. Raises PassError for numbers of tokens, a
    list of another length, and less than half at once.
    """
    parts = keep if isinstance(keep, Sequence) else [1 - (1 - keep) * step / steps for step in range(1, steps + 1)]
    if len(parts) != steps or isinstance(keep, int) or any(isinstance(part, int) for part in parts):
        cause = "tokens that are alike go by parts where their number is not known"
        raise PassError(cause, option="keep", remedy="write a part, or a list with one for each layer")
    found: list[Dim] = []
    for before, part in zip((1.0, *parts), parts, strict=False):
        share = Fraction(2 * (1 - part / before)).limit_denominator(FINEST)
        if not 0 <= share <= 1:
            cause = f"{part:.0%} cannot remain of {before:.0%}: of each two neighbours one can go"
            raise PassError(cause, option="keep", remedy="spread them over more `layers`")
        now = found[-1] if found else tokens
        gone = f"floor({share.numerator}*({mergeable(now, prefix, suffix)})/{share.denominator})"
        found.append(canonical_dim(f"({now})-{gone}"))
    return found


def _between(tokens: Dim, keep: int, step: int, steps: int) -> int:
    return keep if isinstance(tokens, str) else tokens - (tokens - keep) * step // steps


def _count(tokens: Dim, keep: float | int, least: int) -> Dim:
    if isinstance(keep, int):
        return max(keep, least) if isinstance(tokens, int) else canonical_dim(f"Min({max(keep, least)},{tokens})")
    part = Fraction(keep).limit_denominator(FINEST)
    if isinstance(tokens, int):
        return max(math.ceil(part * tokens), least)
    top, bottom = part.numerator, part.denominator
    found = f"floor(({tokens}*{top}+{bottom - 1})/{bottom})"
    return canonical_dim(f"Max({found},Min({least},{tokens}))" if least > 1 else found)
