"""The Ray Serve application as it is built: no Ray runs here."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from jslora.errors import ConfigError
from jslora.integrations.scale import Scale

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed; it is the extra ray"
    ),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # Ray does
]
RUNNING = 4
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 300,
    "max_position_embeddings": 64,
}  # fmt: skip


def build(folder: Path, scale: dict[str, Any], **sections: Any) -> Any:
    """The application of a configuration with these sections, as a cluster would import it."""
    from jslora.integrations.ray_serve import Settings, application

    path = folder / "config.yaml"
    model = {"source": "dummy", "architecture": ARCHITECTURE}
    whole = {"model": model, "scheduler": {"max_running": RUNNING}} | sections
    path.write_text(yaml.safe_dump(whole))
    return application(Settings(config=path, **scale))


def deployment(application: Any, name: str) -> Any:
    """One of the two, wherever it is bound."""
    ingress = application._bound_deployment
    if ingress.name == name:
        return ingress
    (found,) = (
        argument._bound_deployment
        for argument in ingress.init_args
        if hasattr(argument, "_bound_deployment")
    )
    assert found.name == name
    return found


def test_a_number_that_follows_the_load_has_bounds_and_a_target() -> None:
    from jslora.integrations.ray_serve import _count

    assert _count(Scale(min_replicas=2, max_replicas=2), RUNNING) == {"num_replicas": 2}
    for target, expected in ((None, RUNNING), (2.5, 2.5)):
        bounds = Scale(min_replicas=1, max_replicas=3, target_requests=target)
        scaling = _count(bounds, RUNNING)["autoscaling_config"]
        assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
        assert scaling.target_ongoing_requests == expected


def test_settings_of_a_cluster_become_two_deployments(tmp_path: Path) -> None:
    made = build(tmp_path, dict(max_replicas=3, cpus=2, gpus=2), mesh={"model": 2})
    replica, ingress = deployment(made, "Replica"), deployment(made, "Ingress")
    assert replica.ray_actor_options["num_cpus"] == replica.ray_actor_options["num_gpus"] == 2
    assert ingress.num_replicas == 1
    assert ingress.max_ongoing_requests == 3 * replica.max_ongoing_requests > 3 * RUNNING


def test_what_ray_cannot_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gpus is 1: must be mesh\.model, which is 2, or 0"):
        build(tmp_path, dict(gpus=1), mesh={"model": 2})
