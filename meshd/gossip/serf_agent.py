"""This host's own Serf agent: its configuration from the state directory, its start, its end, and its members."""

import sys
from contextlib import suppress
from pathlib import Path

from tenacity import Retrying, stop_after_delay, wait_fixed

from meshd import files
from meshd.endpoint import Endpoint
from meshd.errors import InputError, MeshdError
from meshd.gossip import serf
from meshd.gossip.messages import APPLIED, BURY, CONFIRM, GONE, RECORD, WHERE
from meshd.gossip.serf import Serf
from meshd.mesh.model import Member
from meshd.mesh.records import encode
from meshd.state.directory import State

MEMBER_EVENTS = "member-join,member-leave,member-failed,member-update,member-reap"


def handler_command(state: State) -> str:
    """Return the shell command by which Serf runs the handler. Python is isolated there, so that it starts fast."""
    return f"{sys.executable} -I -S {handlers() / 'meshd_event.py'} {state.directory}"


def event_handlers(state: State) -> list[str]:
    """Return what Serf's `-event-handler` takes. With a daemon, that answers the queries itself."""
    command = handler_command(state)
    queries = (APPLIED, GONE, BURY, RECORD, CONFIRM, WHERE)
    alone = [*(f"query:{name}={command}" for name in queries), f"user:{GONE}={command}"]
    return [f"{MEMBER_EVENTS}={command}", *([] if state.settings.daemon else alone)]


def handlers() -> Path:
    """Return the folder of the handler scripts: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "handlers"
    return inside if inside.is_dir() else package.parent / "handlers"


def configure(state: State) -> Path:
    """Write the Serf agent's configuration (it holds the gossip key: 0600) and return its path.

    Unless an agent runs, which has the old one, there is a new key for RPC in it.
    With a daemon the claim is among the tags from the first packet on, since setting tags later costs 0.5 s. Without
    one, the handler publishes them at the agent's first event.
    """
    settings, claim = state.settings, state.claim()
    if not processes(state):
        # On a full disk Serf starts with the key that is there.
        with suppress(MeshdError):
            state.renew_rpc_key()
    config = serf.agent_config(
        name=settings.name,
        bind=Endpoint(state.bind, settings.gossip_port),
        advertise=Endpoint(state.advertised, settings.gossip_port),
        encrypt_key=state.gossip_key,
        rpc_port=settings.rpc_port,
        rpc_auth=state.rpc_key,
        tags=encode(claim.record) if claim is not None and settings.daemon else {},
        event_handlers=event_handlers(state),
        retry_join=[] if settings.daemon else sorted(map(str, state.contacts().values())),
    )
    # On a full disk Serf starts with the file that is there.
    with suppress(InputError):
        if files.read_json(state.serf_config) == config:
            return state.serf_config
    files.write_json(state.serf_config, config)
    return state.serf_config


def start(state: State) -> serf.Serf:
    """Start the Serf agent, or adopt the one that runs; return a connection to it.

    Raises ConflictError for a taken port, MissingError without Serf, SerfError with what the agent's log says.
    """
    with state.serf_lock():
        pid = serf.running(state.serf_config)
        if pid is None:
            state.reload_settings()  # a command may have ended the agent to have it start with other ones
            extra = state.serf_extra if state.serf_extra.is_dir() else None
            pid = serf.start(configure(state), state.serf_log, extra)
    return serf.wait_ready(access(state), pid, state.serf_log)


def access(state: State) -> serf.Access:
    """Return the way to this host's own agent: that with our configuration, or any of root's where someone runs it."""
    return serf.Access(state.settings.rpc_port, lambda: state.rpc_key, lambda: processes(state))


def processes(state: State) -> list[int]:
    """Return the processes of which one is this host's own agent."""
    if not state.settings.daemon:
        return serf.own_agents()
    pid = serf.running(state.serf_config)
    return [] if pid is None else [pid]


def rpc(state: State, timeout: float = 5.0) -> serf.Serf:
    """Return a connection to the Serf agent that runs now, whoever started it. Raises SerfError."""
    return Serf.connect(access(state), timeout)


def connect(state: State, timeout: float = 10.0) -> serf.Serf:
    """Return a connection to the agent that the daemon is starting. Raises ConflictError or SerfError without one."""

    def find() -> serf.Serf:
        pid = serf.running(state.serf_config)
        if pid is None:
            raise serf.why_ended(state.serf_log)
        return serf.wait_ready(access(state), pid, state.serf_log)

    return Retrying(stop=stop_after_delay(timeout), wait=wait_fixed(0.02), reraise=True)(find)


def name_conflict(state: State) -> str | None:
    """Return the address of another member with this host's name, if the agent has met one. Raises SerfError."""
    with connect(state) as client:
        return client.name_conflict()


def stop(state: State) -> None:
    """End the Serf agent without a goodbye: the others keep this host's peer."""
    pid = serf.running(state.serf_config)
    if pid is not None:
        serf.stop(pid)


def members(state: State) -> list[Member]:
    """Ask this host's own Serf for all members. Raises SerfError."""
    with rpc(state) as client:
        return client.members()
