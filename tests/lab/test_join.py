"""What a person sees who joins: progress on a terminal, and who is not ready."""

from collections.abc import Iterator

import pytest

from meshd.lab.hosts import Lab
from tests.lab.conftest import init, join

pytestmark = [pytest.mark.root, pytest.mark.lab]

STATE = "/var/lib/meshd"


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    yield
    lab.down()


def test_join_waits_for_hosts_and_names_missing(lab: Lab) -> None:
    """`join` waits for the others, shows the progress and names those that are not ready."""
    lab.up(2, docker=False)
    one, two = lab.hosts()
    invitation = {"MESHD_INVITE": init(one, "--no-docker")}
    # Its Serf is alive and its daemon is not: it is a member that has not configured the new host.
    one.run(["sh", "-c", f"kill -STOP $(cat {STATE}/agent.pid)"])
    arguments = [str(one.address), "--no-docker", "--timeout", "2"]
    done = two.run(["meshd", "join", *arguments, "--strict"], env=invitation, check=False)
    assert done.returncode == 3
    assert "1/2 hosts ready" in done.stderr
    assert "not ready after 2 s: barge1; they go on trying" in done.stderr
    assert "barge2  172.20.102.0/24" in done.stdout

    done = two.run(["meshd", "join", *arguments], env=invitation, check=False)
    assert done.returncode == 0, "without --strict that is a warning"
    assert "not ready" in done.stderr

    one.run(["sh", "-c", f"kill -CONT $(cat {STATE}/agent.pid)"])
    done = two.run(["script", "-qec", f"meshd join {one.address}", "/dev/null"], env=invitation)
    # The carriage return between them is a newline to Python's text mode.
    progress = [line for line in done.stdout.splitlines() if line.endswith("hosts ready")]
    assert (progress[0], progress[-1]) == ("1/2 hosts ready", "2/2 hosts ready")


def test_join_says_who_refuses_it_and_why(lab: Lab) -> None:
    """`join` says which host refuses the new one, and for which reason."""
    lab.up(3, docker=False)
    one, two, three = lab.hosts()
    invitation = init(one, "--no-docker")
    join(two, one, invitation, "--no-docker")
    # A network of its own, which no newcomer knows of.
    two.run(["ip", "link", "add", "shop", "type", "bridge"])
    two.run(["ip", "address", "add", "172.20.103.1/28", "dev", "shop"])
    two.run(["ip", "link", "set", "shop", "up"])
    arguments = [str(one.address), "--no-docker", "--timeout", "3", "--subnet", "172.20.103.0/24"]
    done = three.run(["meshd", "join", *arguments], env={"MESHD_INVITE": invitation})
    assert "2/3 hosts ready" in done.stderr
    assert "barge2 is not ready: subnet 172.20.103.0/24 overlaps this host's own network 172.20.103.0/28" in done.stderr
    assert "not ready after" not in done.stderr


def test_commands_require_root(lab: Lab) -> None:
    """Only root can ask for members and status, and the error has no traceback."""
    lab.up(2, docker=False)
    one, _ = lab.hosts()
    for command in ("members", "status", "plan", "invite"):
        done = one.run(["setpriv", "--reuid=65534", "--clear-groups", "meshd", command], check=False)
        assert done.returncode != 0
        assert "Error:" in done.stderr
        assert "Traceback" not in done.stderr
        assert "meshd1." not in done.stdout + done.stderr
