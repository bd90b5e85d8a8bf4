"""jslora as a Ray Serve application: replicas that Ray starts, scales and replaces.

    HTTP -> Ray's proxy -> Ingress -> AffinityRouter -> Replica -> its engine process

`scripts/serve_ray.py` runs it on one machine; on a cluster, Ray imports `application` and gives it
`Settings` from its own file. There is one ingress, as the homes of the adapters are in its memory.
The configuration, with its API keys, travels through Ray: who controls the cluster knows them.
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from jslora.config import EngineConfig, load
from jslora.errors import ConfigError
from jslora.integrations.ray_ingress import Ingress
from jslora.integrations.ray_replica import Replica
from jslora.integrations.scale import Scale, check_gpus
from jslora.server.http import SPARE_CONNECTIONS

HEALTH_SECONDS = 2.0
HEALTH_PATIENCE = 5.0  # Ray replaces a replica that is silent for so long three times in a row
STOP_SECONDS = 15.0  # for an engine to end, after its requests have


class Settings(Scale):
    """The arguments of `application`; `overrides` as for `serve.py --set`."""

    config: Path
    overrides: tuple[str, ...] = ()


def application(settings: Settings) -> Application:
    """The application, as Ray imports it.

    Raises:
        ConfigError: the configuration is wrong.
    """
    return build(load(settings.config, list(settings.overrides)), settings)


def build(
    config: EngineConfig,
    scale: Scale,
    *,
    replica: type[Replica] = Replica,
    router: RequestRouterConfig | None = None,
) -> Application:
    """The application.

    Args:
        replica, router: others than ours, for comparison.

    Raises:
        ConfigError: a replica would be more than one process, which Ray would have to place, or
            has other GPUs than its mesh has devices.
    """
    check_gpus(scale, config.mesh.model)
    if config.distributed.num_processes > 1:
        raise ConfigError("distributed.num_processes: a replica of Ray Serve is one process")
    limits = config.scheduler
    # The engine itself bounds what waits; beyond this, requests wait where they can be cancelled.
    capacity = limits.max_running + limits.max_queued + SPARE_CONNECTIONS
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.server.drain_seconds + STOP_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_PATIENCE,
        "logging_config": {"enable_access_log": False},  # `logging.requests` tells more
    }
    replicas = serve.deployment(
        name="Replica",
        max_ongoing_requests=capacity,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        request_router_config=router or _affinity(limits.max_running),
        **_count(scale, limits.max_running),
        **common,
    )(replica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=1,
        max_ongoing_requests=capacity * scale.max_replicas,
        ray_actor_options={"num_cpus": 0},
        **common,
    )(Ingress)
    return ingress.bind(config, replicas.bind(config))


def _affinity(room: int) -> RequestRouterConfig:
    choice: dict[str, Any] = {
        "request_router_class": "jslora.integrations.ray_router.AffinityRouter",
        "request_router_kwargs": {"room": room},
    }
    return RequestRouterConfig(**choice)


def _count(scale: Scale, room: int) -> dict[str, Any]:
    if scale.min_replicas == scale.max_replicas:
        return {"num_replicas": scale.min_replicas}
    scaling = AutoscalingConfig(
        min_replicas=scale.min_replicas,
        max_replicas=scale.max_replicas,
        target_ongoing_requests=scale.target_requests or room,
    )
    return {"autoscaling_config": scaling}
