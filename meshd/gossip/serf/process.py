"""The Serf agent as a process: its configuration, its start and its end."""

import base64
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from meshd import detached
from meshd.endpoint import Endpoint
from meshd.errors import ConflictError, MissingError, SerfError
from meshd.gossip.serf.client import Access, Serf
from meshd.printable import printable

POLL = 0.02
# Seconds for the first line of its log, which takes 5 ms. On a full disk there is none.
SILENT = 2.0
# What an agent may hold in memory, in bytes. One of 10,000 members holds 70 MiB, and 126 while others join by it.
MEMORY = 256 * 2**20
# Of 1000 at most: when the host's memory is short, the kernel ends the agent first, which carries no traffic.
OOM_SCORE = 900
# Each thread reserves memory that it does not use, and there is one for each of the machine's cores.
ENVIRONMENT = {"GOMAXPROCS": str(min(4, len(os.sched_getaffinity(0)))), "MALLOC_ARENA_MAX": "1"}
# What is read of the log's end, in bytes: the log has no bound, and Go writes a kilobyte for each thing that it does.
TAIL = 2**20
# The agent that was found last, by its configuration file: looking through all processes takes milliseconds.
_found: dict[Path, int] = {}


def agent_config(
    *,
    name: str,
    bind: Endpoint,
    advertise: Endpoint,
    encrypt_key: bytes,
    rpc_port: int,
    rpc_auth: str,
    tags: Mapping[str, str],
    event_handlers: Sequence[str],
    retry_join: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of `serf agent -config-file` (https://www.serf.io/docs/agent/options.html)."""
    return {
        "node_name": name,
        "bind": str(bind),
        "advertise": str(advertise),
        "encrypt_key": base64.b64encode(encrypt_key).decode(),
        "rpc_addr": f"127.0.0.1:{rpc_port}",
        "rpc_auth": rpc_auth,
        # Never `tags_file`: Serf saves an over-long set there and then does not start again.
        "tags": dict(tags),
        "event_handlers": list(event_handlers),
        "log_level": "info",
        # A lost name conflict would end the agent with exit code 0; meshd finds it in the log instead.
        "disable_name_resolution": True,
        # An agent that is ended by a signal has not left: only `meshd leave` says goodbye.
        "leave_on_terminate": False,
        "skip_leave_on_interrupt": True,
        "reconnect_interval": "5s",
        "retry_join": list(retry_join),
        "retry_interval": "5s",
    }


def start(config_path: Path, log_path: Path, extra: Path | None = None) -> int:
    """Start `serf agent`, detached from this process; return its process id. Its output goes to `log_path`.

    `extra` is a directory of someone's own configuration, which Serf merges over ours.
    """
    program = shutil.which("serf")
    if program is None:
        raise MissingError("serf is not installed: apt install serf")
    arguments = [program, "agent", f"-config-file={config_path}", *([f"-config-dir={extra}"] if extra else [])]
    try:
        process = detached.start(arguments, log_path, flags=os.O_TRUNC, environment=ENVIRONMENT)
    except OSError as error:
        opening = error.filename == str(log_path)
        reason = f"opening {log_path}: {error.strerror}" if opening else str(error)
        raise SerfError(f"the Serf agent did not start: {reason}") from error
    # `_alive` waits for it when it has ended, and Popen must not complain that nobody has before.
    process.returncode = 0
    # Its command line is empty for a moment, and whoever looks for the agent then would start a second one.
    while running(config_path) is None and _alive(process.pid):
        time.sleep(POLL / 10)
    _contain_early(process.pid, log_path)
    return process.pid


def _contain_early(pid: int, log_path: Path) -> None:
    """Contain an agent that starts, after Go has reserved its memory and before anybody can fill it.

    That is when the agent writes its first line: it opens its ports later. One that writes none is left to `contain`.
    """
    deadline = time.monotonic() + SILENT
    with suppress(OSError):  # the daemon tries again, and says why it cannot
        while _alive(pid) and time.monotonic() < deadline:
            if log_path.stat().st_size:
                contain(pid)
                break
            time.sleep(POLL / 10)


def contain(pid: int) -> None:
    """Bound the memory of an agent, unless that is done. Raises OSError where the kernel refuses it.

    memberlist unpacks whatever is compressed: 420 kB by TCP are 2 GiB. Go reserves more than it uses, so the bound is
    of what is reserved: as much as now, with MEMORY instead of what is used now. At the bound Go ends the process.
    What the agent runs inherits the bound, and may lift it: that is why it is not a hard one.
    """
    soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        pages = [int(number) for number in Path(f"/proc/{pid}/statm").read_text().split()]
        reserved, used = (number * resource.getpagesize() for number in pages[:2])
        resource.prlimit(pid, resource.RLIMIT_AS, (reserved - used + MEMORY, hard))
    Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))


def running(config_path: Path) -> int | None:
    """Return the process id of the agent that runs with this configuration file, None if there is none."""
    wanted = f"-config-file={config_path}"

    def is_it(pid: int, arguments: list[str] | None) -> bool:
        return arguments is not None and arguments[:1] == [wanted] and _is_own(pid)

    known = _found.get(config_path)
    if known is not None and is_it(known, _arguments(known)):
        return known
    found = next((pid for pid, arguments in agents() if is_it(pid, arguments)), None)
    if found is not None:
        _found[config_path] = found
    return found


def own_agents() -> list[int]:
    """Return the process ids of all agents of this user that run here, whatever their configuration."""
    return [pid for pid, _ in agents() if _is_own(pid)]


def agents() -> Iterator[tuple[int, list[str]]]:
    """Find every `serf agent` that runs here, whoever started it: its process id and its arguments."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (arguments := _arguments(int(entry.name))) is not None:
            yield int(entry.name), arguments


def _arguments(pid: int) -> list[str] | None:
    """Return the arguments of a `serf agent`, None for another process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return None
    return words[2:] if Path(words[0]).name == "serf" and words[1:2] == ["agent"] else None


def _is_own(pid: int) -> bool:
    """Return whether a process is of this user and of this process namespace: anyone may have such a command line.

    Containers and lab hosts show here too, and have more than one number. (A look at the namespace itself would take a
    right that the unit does not leave to the daemon.)
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return False
    facts = {name: words.split() for name, _, words in (line.partition(":") for line in lines)}
    return facts["Uid"][1] == str(os.geteuid()) and len(facts.get("NSpid", "1")) == 1


def wait_ready(access: Access, pid: int, log_path: Path, timeout: float = 10.0) -> Serf:
    """Return a connection as soon as the agent answers.

    Raises ConflictError for a port that is taken, SerfError with what the log says when the agent has ended.
    """
    # Another process on the port is not the agent; that one then ends.
    access = replace(access, processes=lambda: [pid] if _alive(pid) else [])
    alive = retry_if_exception(lambda error: isinstance(error, SerfError) and _alive(pid))
    try:
        retrying = Retrying(retry=alive, stop=stop_after_delay(timeout), wait=wait_fixed(POLL), reraise=True)
        return retrying(Serf.connect, access)
    except SerfError:
        if not _alive(pid):
            raise why_ended(log_path) from None
        raise


def stop(pid: int, timeout: float = 5.0) -> None:
    """End the agent without its leave: SIGTERM, and SIGKILL when that does not help in time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + timeout
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(POLL)
        if not _alive(pid):
            return


def _alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended but was not waited for does not."""
    with suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2][:1]
    except OSError:
        return False
    return state != "Z"


def why_ended(log_path: Path) -> ConflictError | SerfError:
    """Return the error that the agent's log tells of."""
    complaint = (line.strip() for line in reversed(_tail(log_path)) if "rror" in line or "ailed" in line)
    told = last_words(log_path) or printable(next(complaint, "it wrote no reason"))
    if "address already in use" in told:
        return ConflictError(f"the Serf agent did not start, a port is taken: {told}")
    return SerfError(f"the Serf agent did not start: {told}")


def last_words(log_path: Path) -> str:
    """Return why Go ended the agent, according to its log; the empty string if Go did not.

    The state of each thread comes after that, in which any word may be, and the names of members before.
    """
    fatal = (line for line in reversed(_tail(log_path)) if line.startswith(("fatal error: ", "panic: ")))
    return printable(next(fatal, ""))


def _tail(log_path: Path) -> list[str]:
    """Return the last lines of the agent's log."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(0, log_path.stat().st_size - TAIL))
            return log.read(TAIL).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
