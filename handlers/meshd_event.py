#!/usr/bin/env -S python3 -I -S
"""What Serf executes on member events and on meshd's query.

    serf agent -event-handler 'member-join,member-leave,member-failed,member-update,member-reap=.../meshd_event.py'

With a daemon it is a hint: one datagram to the daemon's socket, standard library only, fire and forget (Serf runs
handlers one after the other and without a time-out, so a slow one holds up everything). Without a daemon it becomes
`python3 -m meshd.daemon.handler`, which reconciles by itself. The state directory is its argument, $MESHD_STATE_DIR,
or /var/lib/meshd.
"""

# What `socket` is made of. Importing that takes as long as starting Python does, on each host for each event.
import _socket
import os
import sys


def main() -> None:
    """Hint the daemon, or turn into the handler that works alone."""
    directory = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MESHD_STATE_DIR", "/var/lib/meshd")
    event = os.environ.get("SERF_EVENT", "")
    # Serf waits for both ends of a pipe that holds the event's members; what they say is read again from Serf.
    if event == "query":
        event += " " + os.environ.get("SERF_QUERY_NAME", "")
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    client.setblocking(False)
    try:
        client.sendto(f"serf: {event}".encode()[:512], f"{directory}/agent.sock")
    except BlockingIOError:
        return  # the daemon has hints enough waiting
    except OSError:
        os.execv(sys.executable, [sys.executable, "-I", "-m", "meshd.daemon.handler", directory])  # noqa: S606  no shell is meant


if __name__ == "__main__":
    main()
