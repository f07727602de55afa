"""What a worker sends back: a value, or the error that there was."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compiler.errors import CompressError, ExecutorError, memory_error, out_of_memory

ATTEMPTS = 5
"""How many workers may die of one item before that is an error."""


@dataclass(frozen=True)
class Outcome:
    """``value``, or why there is none."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        """The value. Raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


def outcome(function: Callable[[Any], Any], item: Any) -> Outcome:
    """What ``function(item)`` comes to."""
    try:
        return Outcome(function(item))
    except Exception as error:
        return Outcome(error=_portable(error))


def _portable(error: Exception) -> Exception:
    """``error``, or what says the same and can be pickled; where it came from is not."""
    if out_of_memory(error) and not isinstance(error, CompressError):
        return memory_error()
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error of another library has in it
        return RuntimeError(f"{type(error).__name__}: {error}")


def deaths(how: str) -> ExecutorError:
    """What is said when ``ATTEMPTS`` workers died of the same item."""
    return ExecutorError(
        f"{ATTEMPTS} workers died of the same piece of work, the last one {how}",
        remedy="if memory ran out, use fewer `workers`; what is finished is reused when it is run again",
    )
