"""Ray Serve's choice of a replica for a request: the home of the adapter it names (see `Homes`).

Ray's own multiplexing learns afterwards, from reports of the replicas, who has loaded what, and
so sends an adapter to several of them. Here the choice is made beforehand, and holds. The adapter
is the multiplexed model id, and the request's first argument an `HttpRequest`; a request without an
adapter goes to the replica with the fewest requests.
"""

import time
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from jslora.integrations.homes import Homes


class AffinityRouter(RequestRouter):
    """One of these runs beside each handle of the deployment that names it."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Take `request_router_kwargs`: the `room` of `Homes`."""
        self._homes = Homes(kwargs["room"])

    async def choose_replicas(
        self,
        candidate_replicas: Sequence[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; of the first rank with room, the one with the fewest requests."""
        if pending_request is None:
            return [list(candidate_replicas)]
        # Otherwise Ray asks again without a pause while all replicas are full.
        pending_request.routing_context.should_backoff = True
        adapter = pending_request.metadata.multiplexed_model_id
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not adapter or not replicas:
            return [list(candidate_replicas)]
        loads = {name: self._load(replica) for name, replica in replicas.items()}
        alike = pending_request.args[0].alike
        order = self._homes.order(adapter, loads, alike, time.monotonic())
        return [[replicas[name]] for name in order]

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
