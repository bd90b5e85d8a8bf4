"""A Ray of one machine, for as long as a block runs, that only this machine reaches.

Ray has no dashboard here, and its own ports are on 127.0.0.1 but for one of each replica, which is
on all interfaces and takes nothing without the token that Ray keeps in `~/.ray/auth_token`.
"""

import contextlib
import os
from collections.abc import Iterator

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on those systems too, Ray keeps to 127.0.0.1
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
OBJECT_STORE_BYTES = 128 * 2**20  # answers are too small to go through it


@contextlib.contextmanager
def local_ray(cpus: int, host: str, port: int) -> Iterator[None]:
    """Start Ray and, at `host`:`port`, Ray Serve; nothing of them is left behind.

    Args:
        cpus: how many Ray may give away.
    """
    os.environ.update(ENVIRONMENT)
    import ray  # reads the environment when it is imported
    from ray import serve

    ray.init(
        num_cpus=cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
    )
    try:
        serve.start(http_options={"host": host, "port": port})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
