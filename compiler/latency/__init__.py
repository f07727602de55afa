"""How long a model takes in a runtime: the sum of what each of its operations takes, on shapes that may still change.

A table holds seconds by operation and shapes. It is measured here, by the runtime itself, or brought along from the
device that matters. Nothing is read but types, so what a rewrite would save is known before it is made.
"""

from compiler.latency.model import Latency
from compiler.latency.table import Table, Workload
from compiler.latency.task import Task, task_of

__all__ = ["Latency", "Table", "Task", "Workload", "task_of"]
