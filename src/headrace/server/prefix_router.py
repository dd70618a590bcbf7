"""Ray Serve's router for replicas.py: each request to the replica that its conversation prefers. Needs ray."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from headrace.server.generation import GenerationRequest
from headrace.server.replicas import beginning, in_order

__all__ = ["PrefixRouter"]


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Replicas in ranks of one: Serve takes the first that has room."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates, the preferred one first."""
        request = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if not isinstance(request, GenerationRequest):
            return [candidate_replicas]
        by_name = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        return [[by_name[name]] for name in in_order(beginning(request), sorted(by_name))]
