"""What meshd relies on in Serf, against the agent that is installed (docs/serf.md)."""

import base64
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread

import pytest

from meshd.daemon.keeper import KEY_COMMAND
from meshd.endpoint import Endpoint
from meshd.errors import ConflictError, SerfError
from meshd.gossip import serf
from meshd.gossip.serf import Access, Serf, loopback
from meshd.gossip.serf.process import OOM_SCORE
from meshd.lifecycle.join import ANOTHER_KEY
from meshd.mesh.model import Status
from tests.conftest import eventually
from tests.lab import forge

pytestmark = [pytest.mark.root]

KEY = bytes(range(32))


def access(port: int, pid: int, key: str = "secret") -> Access:
    return Access(port, lambda: key, lambda: [pid])


@dataclass
class Agent:
    """An agent on an address of its own on loopback."""

    name: str
    number: int
    directory: Path
    pid: int

    @property
    def gossip(self) -> str:
        return f"127.0.0.{self.number}:7946"

    @property
    def rpc_port(self) -> int:
        return 7000 + self.number

    @property
    def log(self) -> Path:
        return self.directory / "serf.log"

    @property
    def access(self) -> Access:
        return access(self.rpc_port, self.pid)

    def connect(self) -> Serf:
        return Serf.connect(self.access)

    def states(self) -> dict[str, Status]:
        with self.connect() as client:
            return {member.name: member.status for member in client.members()}


Start = Callable[..., Agent]


@pytest.fixture
def start(netns: object, tmp_path: Path) -> Iterator[Start]:
    """Starts agents in a network namespace of the test's own; they end with it."""
    assert netns
    with ExitStack() as ends:

        def begin(
            number: int,
            *,
            name: str = "",
            key: bytes = KEY,
            tags: dict[str, str] | None = None,
            handlers: tuple[str, ...] = (),
        ) -> Agent:
            directory = tmp_path / str(number)
            directory.mkdir(exist_ok=True)
            agent = Agent(name or f"barge{number}", number, directory, 0)
            address = Endpoint(IPv4Address(f"127.0.0.{number}"), 7946)
            config = serf.agent_config(
                name=agent.name,
                bind=address,
                advertise=address,
                encrypt_key=key,
                rpc_port=agent.rpc_port,
                rpc_auth="secret",
                tags=tags or {},
                event_handlers=handlers,
            )
            path = directory / "serf.json"
            path.write_text(json.dumps(config))
            agent.pid = serf.start(path, agent.log)
            ends.callback(serf.stop, agent.pid)
            serf.wait_ready(agent.access, agent.pid, agent.log).close()
            return agent

        yield begin


def test_agent_without_rpc_key_is_used(netns: object, tmp_path: Path) -> None:
    """An agent without an RPC key can be used."""
    assert netns
    path = tmp_path / "serf.json"
    path.write_text(json.dumps({"bind": "127.0.0.1:7946", "rpc_addr": "127.0.0.1:7001", "node_name": "plain"}))
    pid = serf.start(path, tmp_path / "log")
    try:
        with serf.wait_ready(access(7001, pid, "whatever"), pid, tmp_path / "log") as client:
            assert [member.name for member in client.members()] == ["plain"]
    finally:
        serf.stop(pid)


def test_join_shows_members_with_tags(start: Start) -> None:
    """After a join both members list each other with address and tags."""
    one, two = start(1, tags={"wg": "first"}), start(2, tags={"wg": "second"})
    with two.connect() as client:
        assert client.join([one.gossip]) == 1
        members = {member.name: member for member in client.members()}
    assert {name: member.tags for name, member in members.items()} == {
        "barge1": {"wg": "first"},
        "barge2": {"wg": "second"},
    }
    assert (str(members["barge1"].address), members["barge1"].port) == ("127.0.0.1", 7946)
    eventually(lambda: "barge2" in one.states(), 10, "the other side knows it too")


def test_join_without_answer_raises_error(start: Start) -> None:
    """A join that nobody answers raises SerfError, and the connection goes on."""
    agent = start(1)
    with agent.connect() as client:
        with pytest.raises(SerfError, match="join"):
            client.join(["127.0.0.9:7946"])
        assert len(client.members()) == 1, "and the connection goes on"


def test_join_with_another_gossip_key_fails(start: Start) -> None:
    """A host with another gossip key does not get in."""
    inside, outside = start(1), start(2, key=bytes(32))
    with outside.connect() as client, pytest.raises(SerfError):
        client.join([inside.gossip])
    assert list(inside.states()) == ["barge1"]


def test_key_change_is_logged_and_ends_with_restart(start: Start) -> None:
    """A change of the gossip keys reaches all agents, is logged, and ends when they start again."""
    one, two, newcomer = start(1), start(2), start(3)
    ours, other = (base64.b64encode(key).decode() for key in (KEY, bytes(32)))
    with two.connect() as client:
        client.join([one.gossip])
    for what, key in (("install", other), ("use", other), ("remove", ours)):
        command = ["serf", "keys", f"-rpc-addr=127.0.0.1:{two.rpc_port}", f"-{what}", key]
        subprocess.run(command, env={**os.environ, "SERF_RPC_AUTH": "secret"}, check=True, stdout=subprocess.DEVNULL)
    for agent in (one, two):
        with agent.connect() as client:
            told = (line for line in client.monitor("INFO") if KEY_COMMAND.fullmatch(line))
            assert [next(told).rpartition("Received ")[2] for _ in range(3)] == [
                f"{what}-key query" for what in ("install", "use", "remove")
            ]
        with agent.connect() as client:
            assert client.keys() == {bytes(32)}
    with newcomer.connect() as client:
        with pytest.raises(SerfError, match=f"join: .*{ANOTHER_KEY}"):
            client.join([one.gossip])
        assert list(newcomer.states()) == ["barge3"]
        serf.stop(one.pid)
        again = start(1)
        assert client.join([again.gossip]) == 1, "an agent that starts again has the key of its configuration"
        assert client.keys() == {KEY}


def test_no_name_of_a_member_makes_an_entry_of_the_monitor_of_its_own(start: Start) -> None:
    entry = "2026/11/26 19:05:28 [INFO] serf: Received use-key query"
    one, bogus = start(1), start(2, name=f"x\n    {entry}\ny")
    with bogus.connect() as client:
        client.join([one.gossip])
    assert f"\n    {entry}\n" in one.log.read_text(), "in the file it does"
    with one.connect() as client:
        lines = client.monitor("INFO")
        until = next(line for line in lines if entry in line)
        assert "EventMemberJoin: x" in until
        assert not KEY_COMMAND.fullmatch(until)


def test_query_is_answered_on_its_stream(start: Start) -> None:
    """A query is answered on the connection that streams it."""
    asker, answerer = start(1), start(2)
    with answerer.connect() as client:
        client.join([asker.gossip])
    stream = answerer.connect()

    def answer() -> None:
        for event in stream.stream("query,user"):
            if event["Name"] == "meshd-applied":
                stream.respond(event["ID"], b"yes " + event["Payload"])
            if event["Name"] == "end":
                return

    thread = Thread(target=answer)
    thread.start()
    with asker.connect() as client:

        def answers() -> list[tuple[str, bytes]]:
            return list(client.query("meshd-applied", b"barge1 5", timeout=0.5, nodes=["barge2"]))

        try:
            # What is asked before the stream has begun is lost.
            eventually(lambda: answers() == [("barge2", b"yes barge1 5")], 10, "it answers")
        finally:
            client.event("end", b"")
            thread.join(timeout=5)
            stream.close()


def test_log_reports_join_before_event(start: Start) -> None:
    """The agent's log reports a join before its event stream does."""
    one, two = start(1), start(2)
    heard: dict[str, float] = {}

    listening: set[str] = set()

    def follow(what: str, client: Serf) -> None:
        try:
            if what == "log":
                for line in client.monitor("INFO"):
                    listening.add(what)
                    if "EventMemberJoin: barge2" in line:
                        break
            else:
                for event in client.stream("user,member-join"):
                    listening.add(what)
                    if any(member[b"Name"] == b"barge2" for member in event.get("Members", ())):
                        break
            heard[what] = time.monotonic()
        except SerfError:
            return

    clients = {what: one.connect() for what in ("log", "event")}
    threads = [Thread(target=follow, args=item) for item in clients.items()]
    for thread in threads:
        thread.start()
    with one.connect() as client:

        def all_listen() -> bool:
            client.event("are you there", b"")
            return len(listening) == 2

        eventually(all_listen, 10, "both listen")
    with two.connect() as client:
        client.join([one.gossip])
    eventually(lambda: len(heard) == 2, 10, "both tell of the join")
    for thread in threads:
        thread.join()
    for client in clients.values():
        client.close()
    assert heard["log"] < heard["event"]


def test_monitor_starts_with_old_lines(start: Start) -> None:
    """The monitor starts with the lines that the agent remembers."""
    with start(1).connect() as client:
        assert next(line for line in client.monitor("INFO") if "Serf agent starting" in line)


def test_killed_agent_fails_and_leaving_agent_leaves(start: Start) -> None:
    """An agent that is killed is failed; one that leaves, or is forced to, has left."""
    one, two, three = start(1), start(2), start(3)
    for agent in (two, three):
        with agent.connect() as client:
            client.join([one.gossip])
    eventually(lambda: len(one.states()) == 3, 10, "all are members")
    with three.connect() as client:
        client.leave()
    eventually(lambda: one.states()["barge3"] is Status.LEFT, 10, "a goodbye is a leave")
    serf.stop(two.pid)
    eventually(lambda: one.states()["barge2"] is Status.FAILED, 30, "a signal is no leave")
    with one.connect() as client:
        client.force_leave("barge2")
    eventually(lambda: one.states()["barge2"] is Status.LEFT, 10, "it is declared as left")


def test_name_conflict_is_found_in_log(start: Start) -> None:
    """A name conflict is found in the log, and both agents live."""
    one, rival = start(1, name="same"), start(2, name="same")
    assert conflict(rival) is None
    with rival.connect() as client:
        client.join([one.gossip])
    assert conflict(rival) == "127.0.0.1:7946"
    assert rival.states() == one.states() == {"same": Status.ALIVE}


FORGED = (
    "2026/01/01 00:00:00 [ERR] serf: Node name conflicts with another node at 10.9.9.9:7946. Names must be unique! "
)


def test_name_conflict_is_not_forged_by_a_name(start: Start) -> None:
    """A member's name with a newline forges a line of the log's file, and not what the agent says of its log."""
    one, forger = start(1), start(2, name=f"x\n{FORGED}(Resolution enabled: false)\n{FORGED}")
    with forger.connect() as client:
        client.join([one.gossip])
    eventually(lambda: f"\n{FORGED}" in one.log.read_text(), 5, "the file has the forged line")
    assert conflict(one) is None


def conflict(agent: Agent) -> str | None:
    with agent.connect() as client:
        return client.name_conflict()


@pytest.mark.parametrize("taken", [("127.0.0.1", 7946), ("127.0.0.1", 7001)], ids=["gossip", "rpc"])
def test_taken_port_raises_conflict(start: Start, taken: tuple[str, int]) -> None:
    """A taken port raises ConflictError that names the port."""
    with socket.socket() as squatter:
        squatter.bind(taken)
        squatter.listen()
        with pytest.raises(ConflictError, match=f"a port is taken.*{taken[1]}"):
            start(1)


def test_foreign_agent_on_port_raises_conflict(start: Start, tmp_path: Path) -> None:
    """Another agent that answers on the port is not mistaken for the one that was started."""
    path = tmp_path / "open.json"
    path.write_text(json.dumps({"bind": "127.0.0.9:7946", "rpc_addr": "127.0.0.1:7001", "node_name": "open"}))
    pid = serf.start(path, tmp_path / "open.log")
    try:
        serf.wait_ready(access(7001, pid, ""), pid, tmp_path / "open.log").close()
        with pytest.raises(ConflictError, match=r"a port is taken.*7001"):
            start(1)
    finally:
        serf.stop(pid)


# Says when it listens on 127.0.0.1:7001, then what it is sent. As whoever it is to be, and accepts only if it is to.
SQUAT = """
import os, socket, sys
os.setuid(int(sys.argv[1]))
server = socket.create_server(("127.0.0.1", 7001))
print("listening", flush=True)
while sys.argv[2] == "accepts":
    connection, _ = server.accept()
    print(connection.recv(4096) or "nothing", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("who", "accepts", "error"),
    [
        ("65534", "accepts", r"a process of user 65534 listens on 127\.0\.0\.1:7001"),
        ("0", "accepts", r"another process than the Serf agent \(pid \d+\) listens on 127\.0\.0\.1:7001"),
        ("65534", "does not", r"the Serf agent \(pid \d+\) does not accept"),
    ],
    ids=["another user", "another process", "a silent one"],
)
def test_nothing_is_sent_to_foreign_listener(start: Start, who: str, accepts: str, error: str) -> None:
    """Nothing is sent to another program that has the port."""
    agent = start(2)
    command = [sys.executable, "-I", "-c", SQUAT, who, accepts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as squatter:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == "listening\n"
        try:
            with pytest.raises(SerfError, match=error):
                Serf.connect(access(7001, agent.pid), timeout=0.3)
            with pytest.raises(SerfError, match="the Serf agent does not run, and another process listens"):
                Serf.connect(replace(agent.access, port=7001, processes=list))
            if accepts == "accepts":
                assert [squatter.stdout.readline() for _ in range(2)] == ["nothing\n"] * 2
        finally:
            squatter.kill()


def test_peer_of_connection_is_found_in_both_ways(netns: object) -> None:
    """Both ways to ask the kernel find the process at the other end."""
    assert netns
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        ends = client.getpeername(), client.getsockname()
        ways = loopback._diagnosed, loopback._listed
        assert [way(*ends) for way in ways] == [loopback.Owner(0, 0)] * 2, "nobody's, before it is accepted"
        accepted, _ = server.accept()
        with accepted:
            for one, other, (here, there) in ((client, accepted, ends), (accepted, client, ends[::-1])):
                inode = os.fstat(other.fileno()).st_ino
                assert loopback.other_end(one) == loopback.Owner(inode, os.geteuid())
                assert [way(here, there) for way in ways] == [loopback.Owner(inode, os.geteuid())] * 2
        nobody = (server.getsockname(), ("127.0.0.1", 1))
        assert [way(*nobody) for way in ways] == [None] * 2, "the listener is not the connection"


def test_agent_is_found_by_configuration_and_stopped(start: Start, tmp_path: Path) -> None:
    """A running agent is found by its configuration file and ends by a signal."""
    agent = start(1)
    assert serf.running(agent.directory / "serf.json") == agent.pid
    assert serf.running(tmp_path / "another.json") is None
    serf.stop(agent.pid)
    assert serf.running(agent.directory / "serf.json") is None
    with pytest.raises(SerfError, match=r"does not answer on 127\.0\.0\.1:7001"):
        agent.connect()


@pytest.mark.parametrize(
    "of_others",
    [["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"], ["setpriv", "--reuid=1", "--clear-groups"]],
    ids=["another process namespace", "another user"],
)
def test_foreign_process_is_not_taken_for_agent(of_others: list[str]) -> None:
    """A process of another user or PID namespace with the same command line is not taken for the agent."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as ends:
        Path(directory).chmod(0o755)
        (Path(directory) / "agent").write_text("echo; read -r _")
        foreign, own = Path(directory) / "foreign.json", Path(directory) / "own.json"
        for path, prefix in ((foreign, of_others), (own, [])):
            # A shell by the name of serf that reads its script `agent`.
            command = [*prefix, "bash", "-c", 'exec -a serf bash agent "$@"', "bash", f"-config-file={path}"]
            process = subprocess.Popen(command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            ends.callback(process.communicate)
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
        found = [arguments for _, arguments in serf.agents()]
        assert [f"-config-file={foreign}"] in found, "it does look like an agent"
        assert serf.running(foreign) is None
        assert serf.running(own) == process.pid


def test_handler_gets_event_in_environment(start: Start, tmp_path: Path) -> None:
    """A handler gets the event in its environment."""
    seen = tmp_path / "seen"
    one = start(1, handlers=(f'member-join=echo "$SERF_EVENT $SERF_SELF_NAME" >> {seen}',))
    eventually(
        lambda: seen.exists() and seen.read_text() == "member-join barge1\n", 10, "its own join is its first event"
    )
    two = start(2)
    with two.connect() as client:
        client.join([one.gossip])
    eventually(lambda: seen.read_text() == "member-join barge1\n" * 2, 10, "then the join of the other")


def test_handler_events_are_repeated(start: Start, tmp_path: Path) -> None:
    """A handler hears of earlier updates again with each later event."""
    seen = tmp_path / "seen"
    seen.touch()
    one = start(1, handlers=(f'member-join,member-update=sed "s/^/$SERF_EVENT /" | cut -f1 >> {seen}',))
    with start(2).connect() as client:
        client.join([one.gossip])
        client.tags({"a": "b"}, [])
    eventually(lambda: "member-update barge2" in seen.read_text(), 10, "the update")
    before = seen.read_text()
    with start(3).connect() as client:
        client.join([one.gossip])
    # A handler's call for each kind of event, in any order.
    eventually(lambda: "member-join barge3" in seen.read_text(), 10, "the join")
    eventually(lambda: "member-update barge2" in seen.read_text().removeprefix(before), 5, "the update with it")


def test_handler_payload_ends_with_newline(start: Start, tmp_path: Path) -> None:
    """A handler gets the payload with a newline at its end."""
    seen = tmp_path / "seen"
    one = start(1, handlers=(f"user=cat >> {seen}", f"query=cat >> {seen}"))
    expected = b""
    with one.connect() as client:
        for payload, piped in ((b"a", b"a\n"), (b"b\n", b"b\n"), (b"", b"")):
            client.event("any", payload)
            expected += piped
            eventually(lambda: expected in (seen.read_bytes() if seen.exists() else b""), 10, "the event's")  # noqa: B023
        for payload, piped in ((b"c", b"c\n"), (b"d\n", b"d\n")):
            list(client.query("any", payload, timeout=0.3))
            expected += piped
            eventually(lambda: seen.read_bytes() == expected, 10, "the query's")  # noqa: B023


def test_log_is_private_and_key_is_not_in_argv(start: Start) -> None:
    """Only root can read the log, and the key is in neither arguments nor environment."""
    agent = start(1)
    assert agent.log.stat().st_mode & 0o777 == 0o600
    assert "secret" not in Path(f"/proc/{agent.pid}/cmdline").read_text()
    assert b"secret" not in Path(f"/proc/{agent.pid}/environ").read_bytes()


def send_zeros(agent: Agent, codes: int) -> None:
    """Send an agent zeros by TCP, compressed, as any holder of the gossip key can: 3.8 kB of them for a code."""
    with socket.create_connection((f"127.0.0.{agent.number}", forge.PORT), timeout=5) as sender:
        sender.sendall(forge.stream(KEY, forge.pack("zeros", {"codes": codes})))


def test_memory_of_agent_is_bounded_from_its_start(start: Start) -> None:
    """An agent survives 20 MB of zeros, compressed. A gigabyte ends it, and its log says so."""
    agent = start(1)
    soft, hard = resource.prlimit(agent.pid, resource.RLIMIT_AS)
    assert soft != hard == resource.RLIM_INFINITY
    assert int(Path(f"/proc/{agent.pid}/oom_score_adj").read_text()) == OOM_SCORE
    send_zeros(agent, 8_000)
    eventually(lambda: "memberlist: failed to receive: unexpected EOF" in agent.log.read_text(), 10, "it has read them")
    assert list(agent.states()) == ["barge1"]
    send_zeros(agent, 280_000)
    eventually(lambda: serf.running(agent.directory / "serf.json") is None, 20, "it ends")
    assert serf.last_words(agent.log).startswith("fatal error: ")


# Contains a process as user nobody, with what is imported as root.
CONTAIN = """
import logging, os, sys
from pathlib import Path
from meshd.daemon.keeper import Keeper
from meshd.state.directory import State
logging.basicConfig(format="%(message)s", stream=sys.stdout)
os.setuid(65534)
Keeper(State(Path("/nonexistent")), print, print).adopt(int(sys.argv[1]))
"""


def test_agent_that_cannot_be_contained_goes_on_and_is_reported(start: Start) -> None:
    """Where the kernel refuses to bound an agent's memory, the daemon logs it, and the agent runs."""
    agent = start(1)
    command = [sys.executable, "-c", CONTAIN, str(agent.pid)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == "serf may fill this host's memory: [Errno 1] Operation not permitted\n"
    assert list(agent.states()) == ["barge1"]
