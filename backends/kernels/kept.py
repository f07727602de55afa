"""What CPUs make once of a weight: it lives as long as the weight's tensor, and is made anew when that is changed."""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class _Kept(NamedTuple):
    """What was ``made`` of tensors at certain versions; they are held, so that no others can take their addresses."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    made: Any


# The one state of a process. Views of a tensor (a slice for each expert) share its entry.
_KEPT: Any = WeakTensorKeyDictionary()


def kept(form: Hashable, make: Callable[[], Made], owner: Tensor, *others: Tensor) -> Made:
    """``make()``, which reads ``owner`` and ``others`` and gives ``form``; kept while ``owner`` or its base lives."""
    forms: dict[Any, _Kept] = _KEPT.setdefault(owner if owner._base is None else owner._base, {})
    place = (form, owner.storage_offset(), owner.shape)
    versions = tuple(0 if each.is_inference() else each._version for each in (owner, *others))
    found = forms.get(place)
    if found is None or found.versions != versions or not all(map(_same, found.tensors, others)):
        found = forms[place] = _Kept(tuple(each.detach() for each in others), versions, make())
    return found.made


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
