"""Serf: the RPC client and the agent's process."""

from meshd.gossip.serf.client import Serf
from meshd.gossip.serf.process import (
    agent_config,
    agents,
    clean_environment,
    name_conflict,
    running,
    start,
    stop,
    wait_ready,
)

__all__ = [
    "Serf",
    "agent_config",
    "agents",
    "clean_environment",
    "name_conflict",
    "running",
    "start",
    "stop",
    "wait_ready",
]
