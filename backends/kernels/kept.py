"""What CPUs make once of a weight: it lives as long as the weight's tensor, and is made anew when that is changed."""

# pyright: basic
from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class _Kept(NamedTuple):
    """What was ``made`` of tensors that had ``marks``. The ``others`` are held: no tensor can take their addresses."""

    marks: tuple[Hashable, ...]
    others: tuple[Tensor, ...]
    made: Any


# The one state of a process. Views of a tensor (a slice for each expert) share its entry.
_KEPT: Any = WeakTensorKeyDictionary()


def kept(form: Hashable, make: Callable[[], Made], owner: Tensor, *others: Tensor) -> Made:
    """``make()``, which reads ``owner`` and ``others`` and gives ``form``; kept while ``owner`` or its base lives.

    Of tensors that count no changes, those of inference mode, nothing is kept. What is written through ``.data``
    changes no count either: the first and last elements tell such changes of a whole tensor, and changes of a part
    between them are not noticed. ``torch.no_grad()`` lets parts be written without gradients, and counts.
    """
    tensors = (owner, *others)
    if any(each.is_inference() for each in tensors):
        return make()
    forms: dict[Any, _Kept] = _KEPT.setdefault(owner if owner._base is None else owner._base, {})
    place = (form, owner.storage_offset(), owner.shape)
    marks = tuple(map(_mark, tensors))
    found = forms.get(place)
    if found is None or found.marks != marks:
        found = forms[place] = _Kept(marks, tuple(each.detach() for each in others), make())
    return found.made


def _mark(tensor: Tensor) -> Hashable:
    ends = () if tensor.is_meta else tuple(tensor.detach().flatten()[:: max(tensor.numel() - 1, 1)].tolist())
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), ends
