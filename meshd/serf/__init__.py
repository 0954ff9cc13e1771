"""Serf: the RPC client, the agent's process, and this host's own tags as a resource."""

from meshd.serf.client import Serf
from meshd.serf.process import agent_config, agents, clean_environment, name_conflict, running, start, stop, wait_ready
from meshd.serf.tags import SerfTags

__all__ = [
    "Serf",
    "SerfTags",
    "agent_config",
    "agents",
    "clean_environment",
    "name_conflict",
    "running",
    "start",
    "stop",
    "wait_ready",
]
