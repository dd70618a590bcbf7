"""Independent work, mapped over a Ray cluster or, without an address, done here: the same results in the same order.

    items ─► task ─► task ─► …      a node each; what a task needs (a model) is opened once a process and kept
               └── lost with its node? done again elsewhere

Work is a pure function of its item, so that nobody can tell where an item was done, or how often. Every node needs
headrace and the same files under the same paths. Knows no model and no file.
"""

from __future__ import annotations

import logging
import pickle
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeAlias, TypeVar

from headrace.errors import TargetError, UserError

__all__ = ["Work", "connect", "map_over"]

T = TypeVar("T")
R = TypeVar("R")
Work: TypeAlias = Callable[[], AbstractContextManager[Callable[[T], R]]]
"""Opens what the work needs and gives the function of an item; picklable where there is a cluster."""

LOST = 5  # times that an item may be lost with its node or process; more often, and it is the item that kills them
REACH_SECONDS = 10.0  # for a first sign of the head node
AHEAD = 4  # items under way for each that can run, so that no node waits for the next one

_open: dict[bytes, tuple[ExitStack, Callable[[Any], Any]]] = {}  # in a cluster's process: the one work that it does


def map_over(address: str | None, work: Work[T, R], items: Iterable[T], *, cpus: int = 1) -> Iterator[R]:
    """The function of each item, in the order of the items.

    Args:
        address: of a Ray cluster, as `connect` takes it; None: do the work here, one item after the other.
        work: what is done.
        items: only as many are taken as are under way.
        cpus: of a node, for each item.

    Raises:
        UserError: ray is not installed; or whatever the function raises.
        TargetError: there is no cluster, or an item was lost too often.
    """
    if address is None:
        with work() as function:
            yield from map(function, items)
        return
    ray = connect(address)
    run = ray.remote(num_cpus=cpus, max_retries=LOST)(_run)
    packed = pickle.dumps(work)
    most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(run.remote(packed, item))
            if len(waiting) == most:
                yield _result(ray, waiting[0])
                waiting.popleft()
        while waiting:
            yield _result(ray, waiting[0])
            waiting.popleft()
    finally:
        for left in waiting:  # only where somebody stopped early
            ray.cancel(left)


def connect(address: str) -> Any:
    """The module ray, connected to a cluster; what is connected already stays so.

    Args:
        address: HOST:PORT of the head node, or "auto" for the one that runs here.

    Raises:
        UserError: ray is not installed.
        TargetError: no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs ray, which is not installed: pip install 'headrace[ray]'") from None
    if not ray.is_initialized():
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            told = str(error).strip().partition("\n")[0]
            raise TargetError(
                f"no Ray cluster answers at {address} ({told}); expected HOST:PORT of one: ray start --head"
            ) from None
    return ray


def _reach(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()


def _run(packed: bytes, item: Any) -> Any:
    """An item, in a process of the cluster."""
    if packed not in _open:
        while _open:
            _open.popitem()[1][0].close()
        opened = ExitStack()
        _open[packed] = opened, opened.enter_context(pickle.loads(packed)())
    return _open[packed][1](item)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        told = str(error).strip().partition("\n")[0]
        raise TargetError(f"the cluster lost a piece of the work {LOST + 1} times ({told}); see its logs") from None
