"""Which flows the network policies leave: all that are listed, and no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.deploy.manifests import Object, Pod, pods

DNS = "kube-system/k8s-app=kube-dns"
OPERATOR = "kuberay-system/app.kubernetes.io/name=kuberay-operator"
API = "0.0.0.0/0"
OUTSIDE = "0.0.0.0/0 but 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16"
ROLES = ("mlflow", "postgres", "ray-head", "ray-worker", "submitter")
RAY = ("ray-head", "ray-worker")

Flow = tuple[str, str, str]  # from, to, protocol and port

LISTED: set[Flow] = {
    *((role, DNS, f"{protocol} 53") for role in ROLES for protocol in ("UDP", "TCP")),
    *((one, other, "any") for one in RAY for other in RAY),
    ("submitter", "ray-head", "TCP 8265"),
    (OPERATOR, "ray-head", "TCP 8265"),
    ("ray-head", "mlflow", "TCP 5000"),
    ("ray-head", "postgres", "TCP 5432"),
    ("mlflow", "postgres", "TCP 5432"),
}
# What a component adds.
AUTOSCALER: set[Flow] = {("ray-head", API, f"TCP {port}") for port in (443, 6443)}
OBJECT_STORE: set[Flow] = {(role, OUTSIDE, "TCP 443") for role in RAY}
GKE: set[Flow] = {
    (role, *rest)
    for role in RAY
    for rest in (("169.254.169.254/32", "TCP 80"), ("169.254.169.252/32", "TCP 988"))
}
GKE |= {
    (role, "169.254.20.10/32", f"{protocol} 53") for role in ROLES for protocol in ("UDP", "TCP")
}
EKS: set[Flow] = {(role, "169.254.170.23/32", "TCP 80") for role in RAY}
ADDED = {
    "base": set(),
    "kind-cpu": set(),
    "kueue": set(),
    "gpu": AUTOSCALER,
    "gpu-spot": AUTOSCALER,
    "gke": AUTOSCALER | OBJECT_STORE | GKE,
    "eks": AUTOSCALER | OBJECT_STORE | EKS,
}


def network_problems(objects: tuple[Object, ...], overlay: str) -> Iterator[str]:
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    everything = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if everything not in policies:
        yield "nothing denies by default"
    yield from _idle(policies, pods(objects))
    wanted = LISTED | ADDED[overlay]
    # Each end allows what is listed and no more, whatever the other end does.
    ends = {
        "egress": {flow for flow in wanted if flow[0] in ROLES},
        "ingress": {flow for flow in wanted if flow[1] in ROLES},
    }
    for direction, expected in ends.items():
        flows = set(_flows(policies, pods(objects), direction))
        for flow in sorted(flows ^ expected):
            yield f"{direction}: {'unlisted' if flow in flows else 'missing'} flow {flow}"


def _idle(policies: list[Object], all_pods: list[Pod]) -> Iterator[str]:
    """A type without a rule denies; a rule without its type is lost."""
    for policy in policies:
        if not any(_matches(policy["podSelector"], pod.labels) for pod in all_pods):
            yield f"{policy['podSelector']} selects no pod"
        types, rules = policy.get("policyTypes"), policy.keys() & {"ingress", "egress"}
        if rules and {one.lower() for one in types or []} != rules:
            yield f"policyTypes {types} with {sorted(rules)}"


def _flows(policies: list[Object], all_pods: list[Pod], direction: str) -> Iterator[Flow]:
    """What one end allows."""
    peers = "to" if direction == "egress" else "from"
    for pod in all_pods:
        for policy in policies:
            if not _matches(policy["podSelector"], pod.labels):
                continue
            for rule in policy.get(direction, []):
                for other in _others(rule.get(peers, [{}]), all_pods):
                    for port in rule.get("ports", [{}]):
                        ends = (pod.role, other) if direction == "egress" else (other, pod.role)
                        yield (*ends, _port(port))


def _port(port: Mapping[str, Any]) -> str:
    if not port:
        return "any"
    return f"{port.get('protocol', 'unsaid')} {port.get('port', 'any')!r}"


def _others(peers: list[Mapping[str, Any]], all_pods: list[Pod]) -> Iterator[str]:
    for peer in peers:
        if "ipBlock" in peer:
            block = peer["ipBlock"]
            but = f" but {', '.join(block['except'])}" if "except" in block else ""
            yield f"{block['cidr']}{but}"
        elif "namespaceSelector" in peer:
            yield _elsewhere(peer)
        elif peer:
            yield from {p.role for p in all_pods if _matches(peer["podSelector"], p.labels)}
        else:
            yield "everything"


def _elsewhere(peer: Mapping[str, Any]) -> str:
    space = peer["namespaceSelector"].get("matchLabels", {})
    labels = peer.get("podSelector", {}).get("matchLabels", {})
    name = space.get("kubernetes.io/metadata.name", "any")
    return f"{name}/{','.join(f'{k}={v}' for k, v in labels.items()) or 'any'}"


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", "the only one that we use"
        if labels.get(expression["key"]) not in expression.get("values", []):
            return False
    return True
