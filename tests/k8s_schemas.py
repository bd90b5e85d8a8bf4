"""Schemas of the custom resources we ship: as much of them as we use, and nothing else allowed.

Written from the resources' definitions: LeaderWorkerSet v0.9, the Gateway API and its inference
extension 1.6, Prometheus' operator, llm-d's router 0.9. Pods in them are checked as core ones.
"""

from typing import Any


def closed(required: str = "", /, **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others; `required` are their names."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(items: Any, least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


def resource(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """An object of a cluster."""
    metadata = closed("name", name=LABEL_VALUE, labels=LABELS, annotations=LABELS)
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
LABEL_VALUE = {"type": "string", "pattern": r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"}
LABELS = {"type": "object", "additionalProperties": LABEL_VALUE}
MATCH_LABELS = closed("matchLabels", matchLabels={**LABELS, "minProperties": 1})
INT_OR_PERCENT = {"anyOf": [COUNT, {"type": "string", "pattern": r"^[0-9]+%$"}]}
POD = {"type": "object", "required": ["spec"]}
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}

LEADER_WORKER_SET = resource(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    closed(
        "leaderWorkerTemplate",
        replicas=COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        rolloutStrategy=closed(
            "type",
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=closed(
                maxSurge=INT_OR_PERCENT, maxUnavailable=INT_OR_PERCENT, partition=COUNT
            ),
        ),
        leaderWorkerTemplate=closed(
            "workerTemplate",
            size={"type": "integer", "minimum": 1},
            restartPolicy={
                "enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
            },
            leaderTemplate=POD,
            workerTemplate=POD,
        ),
    ),
)

INFERENCE_POOL = resource(
    "inference.networking.k8s.io/v1",
    "InferencePool",
    closed(
        "selector targetPorts endpointPickerRef",
        selector=MATCH_LABELS,
        targetPorts={**listed(closed("number", number=PORT)), "maxItems": 8},
        appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
        endpointPickerRef=closed(
            "name port",  # a Service needs its port
            name=TEXT,
            kind={"const": "Service"},
            port=closed("number", number=PORT),
            failureMode={"enum": ["FailOpen", "FailClose"]},
        ),
    ),
)

HTTP_ROUTE = resource(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    closed(
        "parentRefs rules",
        parentRefs=listed(closed("name", name=TEXT, namespace=TEXT)),
        rules=listed(
            closed(
                "backendRefs",
                matches=listed(
                    closed(
                        path=closed(
                            "type value",
                            type={"enum": ["Exact", "PathPrefix"]},
                            value={"type": "string", "pattern": "^/"},
                        )
                    )
                ),
                backendRefs=listed(
                    closed(
                        "group kind name",
                        group={"const": "inference.networking.k8s.io"},
                        kind={"const": "InferencePool"},
                        name=TEXT,
                        port=PORT,
                    )
                ),
                timeouts=closed(request=DURATION, backendRequest=DURATION),
            )
        ),
    ),
)

POD_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    closed(
        "selector podMetricsEndpoints",
        selector=MATCH_LABELS,
        podTargetLabels=listed(TEXT),
        podMetricsEndpoints=listed(
            closed(
                "port path",
                port=TEXT,
                path={"type": "string", "pattern": "^/"},
                interval=DURATION,
                metricRelabelings=listed(
                    closed(
                        sourceLabels=listed(TEXT),
                        regex=TEXT,
                        action={"enum": ["replace", "keep", "drop", "labeldrop"]},
                    )
                ),
            )
        ),
    ),
)

CUSTOM = {
    "LeaderWorkerSet": LEADER_WORKER_SET,
    "InferencePool": INFERENCE_POOL,
    "HTTPRoute": HTTP_ROUTE,
    "PodMonitor": POD_MONITOR,
}

_PARAMETERS = {
    "metrics-data-source": closed(
        scheme={"enum": ["http", "https"]}, path=TEXT, insecureSkipVerify={"type": "boolean"}
    ),
    "core-metrics-extractor": closed(
        engineLabelKey=TEXT,
        defaultEngine=TEXT,
        engineConfigs=listed(
            closed(
                "name",
                name={"type": "string", "pattern": "^(?!default$).+"},
                queuedRequestsSpec=TEXT,
                runningRequestsSpec=TEXT,
                kvUsageSpec=TEXT,
                loraSpec=TEXT,
                cacheInfoSpec=TEXT,
                cacheBlockSizeLabelName=TEXT,
                cacheNumBlocksLabelName=TEXT,
            )
        ),
    ),
    "utilization-detector": closed(
        queueDepthThreshold={"type": "integer", "minimum": 1},
        kvCacheUtilThreshold={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        metricsStalenessThreshold=DURATION,
        headroom={"type": "number", "minimum": 0},
    ),
}
_WITHOUT = ("lora-affinity-scorer", "active-request-scorer", "queue-scorer",
            "kv-cache-utilization-scorer", "prefix-cache-scorer", "max-score-picker")  # fmt: skip

PICKER_CONFIG = closed(
    "apiVersion kind plugins schedulingProfiles",
    apiVersion={"const": "llm-d.ai/v1alpha1"},
    kind={"const": "EndpointPickerConfig"},
    plugins=listed(
        {
            "oneOf": [
                closed("type", name=TEXT, type={"enum": list(_WITHOUT)}),
                *(
                    closed("type", name=TEXT, type={"const": name}, parameters=parameters)
                    for name, parameters in _PARAMETERS.items()
                ),
            ]
        }
    ),
    schedulingProfiles=listed(
        closed(
            "name plugins",
            name=TEXT,
            plugins=listed(
                closed("pluginRef", pluginRef=TEXT, weight={"type": "number", "minimum": 0})
            ),
        )
    ),
)
"""The picker's own configuration file."""
