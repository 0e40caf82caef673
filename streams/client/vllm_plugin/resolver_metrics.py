"""Counters of the plugin, on vLLM's own `/metrics`: they are in the registry that vLLM shows."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_BUCKETS_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class ResolverMetrics:
    """The plugin's series.

    Args:
        registry: Where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "perennial_resolver_requests", "Names that vLLM asked the plugin for.", ("outcome",), registry=registry
        )
        self.untrusted = Counter(
            "perennial_resolver_untrusted", "Aliases and versions refused for their signature or place.", ("reason",),
            registry=registry,
        )  # fmt: skip
        self.refreshes = Counter(
            "perennial_resolver_refreshes", "Changes of names that vLLM knows.", ("outcome",), registry=registry
        )
        self.names = Gauge("perennial_resolver_names", "Names that vLLM knows from the plugin.", registry=registry)
        self.bytes = Gauge("perennial_resolver_bytes", "Bytes of weights in the plugin's folder.", registry=registry)
        self.stale_since = Gauge(
            "perennial_resolver_stale_since_seconds",
            "When the oldest version was published that a name does not serve yet, in seconds since 1970; 0: none.",
            registry=registry,
        )
        self.published_to_served = Histogram(
            "perennial_resolver_published_to_served_seconds",
            "Time from a change of an alias until the server serves it.",
            buckets=_BUCKETS_S,
            registry=registry,
        )


@lru_cache(maxsize=1)
def resolver_metrics() -> ResolverMetrics:
    """Return the series of this process."""
    return ResolverMetrics(REGISTRY)
