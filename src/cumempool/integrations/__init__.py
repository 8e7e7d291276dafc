"""Adapts cumempool to other systems: Prometheus, NIXL, KV transfer connectors."""
