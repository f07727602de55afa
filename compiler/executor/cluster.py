"""Workers of a Ray cluster: the one that this machine belongs to, or one of this machine alone.

Every machine needs this package in the same version, and the same paths of models, data and outputs.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection
from typing import Any, TypeVar

from compiler.errors import ExecutorError, first_line
from compiler.executor import default_workers
from compiler.executor.outcome import ATTEMPTS, Outcome, deaths, outcome

T = TypeVar("T")
R = TypeVar("R")

STORE = 100_000_000
"""Bytes of Ray's store of objects on one machine: tasks are small, and write what they make themselves."""

CONNECT = 10
"""Seconds in which the machine that RAY_ADDRESS names has to accept a connection."""


@dataclass(frozen=True)
class Cluster:
    """Tasks of Ray, so many at once."""

    ray: Any
    workers: int

    @contextmanager
    def open(self, function: Callable[[T], R]) -> Generator[Callable[[T], R]]:
        task = self.ray.remote(_outcome_in).options(max_retries=ATTEMPTS - 1)
        folder, shared = str(Path.cwd()), self.ray.put(function)
        running: set[Any] = set()

        def call(item: T) -> R:
            begun = task.remote(folder, shared, item)
            running.add(begun)
            try:
                return self.ray.get(begun).get()
            except self.ray.exceptions.WorkerCrashedError as reason:
                raise deaths("as Ray reports it") from reason
            except self.ray.exceptions.RayError as reason:
                raise ExecutorError(f"Ray failed: {first_line(reason)}", remedy="see Ray's logs") from reason
            finally:
                running.discard(begun)

        try:
            yield call
        finally:
            for begun in list(running):
                self.ray.cancel(begun, force=True)


def _outcome_in(folder: str, function: Callable[[Any], Any], item: Any) -> Outcome:
    """What ``function(item)`` comes to in ``folder``, which relative paths start from."""
    os.chdir(folder)
    return outcome(function, item)


@contextmanager
def open_cluster(workers: int | None) -> Generator[Cluster]:
    """Join the cluster that RAY_ADDRESS or this machine names, or start one here, which ends with the run.

    Raises ExecutorError when Ray is not installed, does not start, or RAY_ADDRESS is of no cluster.
    """
    ray = _ray()
    if ray.is_initialized():
        yield _cluster(ray, workers)
        return
    _join(ray, workers)
    try:
        with redirect_stdout(sys.stderr):  # where Ray tells of workers that died
            yield _cluster(ray, workers)
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as reason:
        cause = "`executor: ray` needs Ray, which is not installed"
        raise ExecutorError(cause, remedy="pip install 'compress-model[ray]', or use `executor: processes`") from reason


def _join(ray: Any, workers: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    address, remedy = os.environ.get("RAY_ADDRESS"), "correct RAY_ADDRESS, or unset it to start one here"
    if address is not None and not _answers(address):
        raise ExecutorError(f"no Ray cluster answers at {address}", remedy=remedy)
    try:
        ray.init(address="auto", **quiet)
        return
    except Exception as reason:  # an address can be wrong in many ways, and Ray has an error of another kind for each
        if address is not None:
            cause = f"no Ray cluster can be joined at {address}: {first_line(reason)}"
            raise ExecutorError(cause, remedy=remedy) from reason
        if not isinstance(reason, ConnectionError):
            cause = f"the Ray cluster of this machine cannot be joined: {first_line(reason)}"
            raise ExecutorError(cause, remedy="`ray stop` ends it, or use `executor: processes`") from reason
    cores = workers or default_workers("ray")
    try:
        ray.init(num_cpus=cores, object_store_memory=STORE, include_dashboard=False, **quiet)
    except Exception as reason:  # of a dozen unrelated kinds
        raise ExecutorError(f"Ray does not start: {first_line(reason)}", remedy="use `executor: processes`") from reason


def _answers(address: str) -> bool:
    """Whether anybody is at ``host:port``, for which Ray would wait minutes; of other forms it tells by itself."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return True
    try:
        create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
    except (OSError, OverflowError):
        return False
    return True


def _cluster(ray: Any, workers: int | None) -> Cluster:
    return Cluster(ray, workers or int(ray.cluster_resources()["CPU"]))
