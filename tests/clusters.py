"""A Ray cluster on this machine whose nodes can be lost, for the tests that are marked `ray`."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

NODE = {"object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1"}  # results are small
ENVIRONMENT = {  # before ray is imported
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 is the loopback, not this machine's other address
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_agent_register_timeout_ms": "300000",  # a crowded machine takes its time
}


def on_ray(test: T) -> T:
    """Marks a test that needs a cluster. What Ray leaves open or finds deprecated is Ray's."""
    marked: T = pytest.mark.ray(pytest.mark.filterwarnings("ignore")(test))
    return marked


class Cluster:
    """Three nodes on this machine: one that keeps the books and two that work."""

    def __init__(self) -> None:
        os.environ.update(ENVIRONMENT)
        import ray
        from ray.cluster_utils import Cluster as Nodes

        self._ray = ray
        self._nodes = Nodes()
        self._start(num_cpus=0, include_dashboard=False)
        self.address: str = self._nodes.address
        self.workers = [self.add(), self.add()]
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")

    def add(self) -> Any:
        """One more node that works."""
        return self._start(num_cpus=1)

    def _start(self, **options: Any) -> Any:
        """A node; Ray gives it 30 seconds to come up, which on a crowded machine may take three tries."""
        for _ in range(2):
            with suppress(Exception):
                return self._nodes.add_node(**options, **NODE)
        return self._nodes.add_node(**options, **NODE)

    def lose_one(self) -> None:
        """A node is gone without a goodbye; another one comes."""
        self._nodes.remove_node(self.workers.pop(), allow_graceful=False)
        self.workers.append(self.add())

    def close(self) -> None:
        """End what was started."""
        self._ray.shutdown()
        self._nodes.shutdown()
