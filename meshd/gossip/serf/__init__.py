"""Serf: the RPC client and the agent's process."""

from meshd.gossip.serf.client import Access, Serf
from meshd.gossip.serf.process import (
    agent_config,
    agents,
    contain,
    last_words,
    own_agents,
    running,
    start,
    stop,
    wait_ready,
    why_ended,
)

__all__ = [
    "Access",
    "Serf",
    "agent_config",
    "agents",
    "contain",
    "last_words",
    "own_agents",
    "running",
    "start",
    "stop",
    "wait_ready",
    "why_ended",
]
