"""The Docker network on the bridge, by Docker's SDK.

Docker adopts the bridge that `links` has made, with its address and MTU, and leaves it in place when the network is
removed. Facts of the API: https://docs.docker.com/reference/api/engine/.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from threading import Event, Thread
from typing import Any, ClassVar

from meshd.errors import ApplyError, ConflictError, InUseError, MeshdError, MissingError
from meshd.net.resources import Action, Change, Container, Engine, Network, Resource

LABEL = "meshd.mesh"
# Making or removing a network takes Docker seconds on a busy host; an answer to a question does not. A reconcile waits
# for an engine that hangs (or that systemd's socket holds back), and everything else waits for the reconcile.
TIMEOUT = 20
ASK_TIMEOUT = 3
PAUSE = 1.0
LOOK = 2.0
# How many containers an error names.
MOST = 10
_BRIDGE_NAME = "com.docker.network.bridge.name"
_MTU = "com.docker.network.driver.mtu"
_ADVICE = "start it (systemctl start docker), install it (apt install docker.io), or join with --no-docker"


# What Docker takes for a network without a subnet, unless its configuration says otherwise (libnetwork's ipamutils).
DEFAULT_POOLS = (*(IPv4Network((f"172.{octet}.0.0", 16)) for octet in range(17, 32)), IPv4Network("192.168.0.0/16"))
_PROJECT = "com.docker.compose.project"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A Docker network of somebody else: its name, a subnet of it, its containers, and the Compose project it is of."""

    name: str
    subnet: IPv4Network
    containers: tuple[str, ...] = ()
    project: str = ""

    def __str__(self) -> str:
        """Name it and who uses it, as a part of a sentence."""
        shown = ", ".join(self.containers[:MOST]) + (", …" if self.containers[MOST:] else "")
        users = f"used by {shown}" if shown else "without containers"
        return f"the Docker network {self.name} ({self.subnet}), {users}"

    def problem(self, overlay: IPv4Network) -> str:
        """Say that it is in the way of an overlay which it overlaps, and what to do."""
        return f"{overlay} overlaps {self}: {self.removal}"

    @property
    def removal(self) -> str:
        """Say what to do to remove it."""
        if self.project:
            return f"run 'docker compose -p {self.project} down'"
        first = "remove its containers, then " if self.containers else ""
        return f"{first}run 'docker network rm {self.name}'"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container on the network: its id and name, and by which other names its neighbours there find it."""

    container: str
    name: str
    aliases: tuple[str, ...] = ()


class DockerNetwork:
    """The adapter of the mesh's Docker network, which has the name of its bridge."""

    kinds: ClassVar[frozenset[str]] = frozenset({"network"})

    def __init__(self, mesh: str, name: str, base_url: str | None = None) -> None:
        self.mesh = mesh
        self.name = name
        self._base_url = base_url

    def engine(self) -> Engine:
        """Return the engine's version and firewall backend. Raises MissingError if Docker is absent or stopped."""
        with _client("asking Docker for its version", self._base_url) as client:
            # FirewallBackend came with API 1.49; before, Docker knew iptables only.
            backend = client.info().get("FirewallBackend") or {}
            return Engine(str(client.version()["Version"]), str(backend.get("Driver", "iptables")))

    def read(self) -> list[Resource]:
        with _client("listing Docker networks", self._base_url) as client:
            attributes = self._find(client)
            if attributes is None or not self._is_ours(attributes):
                return []
            return [_network(attributes), *_containers(attributes)]

    def apply(self, change: Change) -> None:
        network = change.resource
        assert isinstance(network, Network)  # noqa: S101  what the dispatch by kind guarantees, for the type checker
        with _client(f"{change.action} {network}", self._base_url, TIMEOUT) as client:
            attributes = self._find(client)
            if change.action is Action.REMOVE:
                self._remove(client, attributes)
            elif attributes is None:
                self._create(client, network)
            elif not self._is_ours(attributes):
                raise ConflictError(self._foreign(attributes, network.subnet))
            elif (found := _network(attributes)) != network:
                self._replace(client, attributes, found, network)

    def containers(self) -> list[str]:
        """Name the containers that are attached to the network."""
        with _client(f"listing the containers on {self.name}", self._base_url) as client:
            attributes = self._find(client)
            return _attached(attributes) if attributes is not None and self._is_ours(attributes) else []

    def attachments(self) -> list[Attachment]:
        """Return the containers that are attached to the network, with what attaching them again takes."""
        with _client(f"listing the containers on {self.name}", self._base_url) as client:
            attributes = self._find(client)
            if attributes is None or not self._is_ours(attributes):
                return []
            attached = sorted((attributes.get("Containers") or {}).items())
            return [
                Attachment(container, str(facts.get("Name")), self._aliases(client, container))
                for container, facts in attached
            ]

    def disconnect(self, attachments: Iterable[Attachment]) -> None:
        """Detach containers, which go on running without the overlay."""
        from docker.errors import APIError  # noqa: PLC0415  160 ms of imports

        with _client(f"disconnecting the containers on {self.name}", self._base_url, TIMEOUT) as client:
            network = client.networks.get(self.name)
            for attachment in attachments:
                # One that ends meanwhile must not keep the others; what stays attached keeps the network, and is named.
                with suppress(APIError):
                    network.disconnect(attachment.container, force=True)

    def attach(self, attachment: Attachment) -> str:
        """Attach a container unless it is; return its address on the overlay, the empty string if it has ended."""
        from docker.errors import NotFound  # noqa: PLC0415  160 ms of imports

        with _client(f"attaching container {attachment.name} to {self.name}", self._base_url, TIMEOUT) as client:
            network = client.networks.get(self.name)
            try:
                found = client.containers.get(attachment.container)
            except NotFound:
                return ""
            if _endpoint(found.attrs, self.name).get("NetworkID") != network.id:
                network.connect(attachment.container, aliases=list(attachment.aliases))
                found.reload()
            return str(_endpoint(found.attrs, self.name).get("IPAddress", ""))

    def overlapping(self, overlay: IPv4Network) -> list[Foreign]:
        """Return the other Docker networks that overlap the overlay, sorted by name."""
        with _client("listing Docker networks", self._base_url) as client:
            return self._overlapping(client, overlay)

    def _overlapping(self, client: Any, overlay: IPv4Network) -> list[Foreign]:
        found = [
            _foreign(client, network, subnet)
            for network in client.networks.list()
            if not self._is_ours(network.attrs)
            for subnet in _subnets(network.attrs)
            if subnet.overlaps(overlay)
        ]
        return sorted(found, key=lambda network: network.name)

    def ranges(self) -> list[IPv4Network]:
        """Return the subnets of all Docker networks, and the pools from which Docker is configured to take more."""
        with _client("listing Docker networks", self._base_url) as client:
            subnets = [subnet for network in client.networks.list() for subnet in _subnets(network.attrs)]
            pools = [str(pool.get("Base", "")) for pool in client.info().get("DefaultAddressPools") or ()]
        return subnets + [IPv4Network(pool, strict=False) for pool in pools if pool and ":" not in pool]

    def occupied(self, overlay: IPv4Network) -> str:
        """Say what is in the way if a Docker network of this name exists that is not this mesh's."""
        with _client("listing Docker networks", self._base_url) as client:
            attributes = self._find(client)
            return "" if attributes is None or self._is_ours(attributes) else self._foreign(attributes, overlay)

    def _find(self, client: Any) -> dict[str, Any] | None:
        """Return what `docker network inspect` says of the network; the API's filter by name matches parts of names."""
        from docker.errors import NotFound  # noqa: PLC0415  160 ms of imports

        found = [n for n in client.networks.list(names=[self.name]) if n.name == self.name]
        with suppress(NotFound):  # removed a moment ago
            return dict(client.networks.get(found[0].id).attrs) if found else None
        return None

    def _aliases(self, client: Any, container: str) -> tuple[str, ...]:
        from docker.errors import NotFound  # noqa: PLC0415  160 ms of imports

        try:
            endpoint = _endpoint(client.containers.get(container).attrs, self.name)
        except NotFound:
            return ()
        # Docker adds the short id by itself.
        return tuple(alias for alias in endpoint.get("Aliases") or () if alias != container[:12])

    def _is_ours(self, attributes: dict[str, Any]) -> bool:
        return (attributes.get("Labels") or {}).get(LABEL) == self.mesh and attributes.get("Name") == self.name

    def _create(self, client: Any, network: Network) -> None:
        from docker.types import IPAMConfig, IPAMPool  # noqa: PLC0415  160 ms of imports

        pool = IPAMPool(str(network.subnet), str(network.ip_range), str(network.gateway))
        # Docker itself says no more than that the address space is taken.
        if rivals := self._overlapping(client, network.subnet):
            raise ConflictError(rivals[0].problem(network.subnet))
        client.networks.create(
            network.name,
            driver="bridge",
            ipam=IPAMConfig(pool_configs=[pool]),
            options={_BRIDGE_NAME: network.bridge, _MTU: str(network.mtu), **dict(network.options)},
            labels={LABEL: self.mesh},
        )

    def _remove(self, client: Any, attributes: dict[str, Any] | None) -> None:
        if attributes is None or not self._is_ours(attributes):
            return
        if attached := _attached(attributes):
            raise ConflictError(f"containers are attached to the Docker network {self.name}: {', '.join(attached)}")
        client.networks.get(attributes["Id"]).remove()

    def _replace(self, client: Any, attributes: dict[str, Any], found: Network, network: Network) -> None:
        """Make the network again with other settings: Docker cannot change one in place."""
        if attached := _attached(attributes):
            raise InUseError(
                f"the Docker network {self.name} is {_differences(found, network)}, but containers are attached "
                f"({', '.join(attached)}): stop them, and the next sync re-creates it"
            )
        client.networks.get(attributes["Id"]).remove()
        self._create(client, network)

    def _foreign(self, attributes: dict[str, Any], wanted: IPv4Network) -> str:
        subnets = ", ".join(map(str, _subnets(attributes))) or "no subnet"
        return (
            f"the Docker network {self.name} ({subnets}) exists already and is not this mesh's, which wants "
            f"{wanted}: remove it (docker network rm {self.name}) or join with --bridge and another name"
        )


def watch(
    name: str,
    hint: Callable[[str], None],
    restarted: Callable[[str], None],
    stop: Event,
    base_url: str | None = None,
) -> None:
    """Call `hint` when the network `name` changes, and `restarted` when the engine goes away or comes back.

    It ends when `stop` is set, and never raises.
    """
    away = False
    while not stop.is_set():
        try:
            # Without a time-out: a quiet engine has no events for hours.
            with _client("following Docker's events", base_url, timeout=None) as client:
                if away:
                    restarted("is back")
                away = False
                _follow(client, name, hint, stop)
        except MeshdError:
            pass  # no engine, or it went away: the stream ends in one way or another
        if not stop.is_set():
            if not away:
                restarted("went away")
            away = True
            stop.wait(PAUSE)


def _follow(client: Any, name: str, hint: Callable[[str], None], stop: Event) -> None:
    events = client.events(decode=True, filters={"type": "network"})
    # The read blocks beyond any stop.
    with _ended_by(stop, events.close):
        for event in events:
            attributes = (event.get("Actor") or {}).get("Attributes") or {}
            if attributes.get("name") == name and event.get("Action") in {"create", "destroy"}:
                hint(f"network {name} {event['Action']}")


@contextmanager
def _ended_by(stop: Event, end: Callable[[], None]) -> Iterator[None]:
    over = Event()

    def wait() -> None:
        while not over.is_set():
            if stop.wait(LOOK):
                end()
                return

    Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def _client(doing: str, base_url: str | None, timeout: int | None = ASK_TIMEOUT) -> Iterator[Any]:
    """Return a client of the engine; what goes wrong inside is told as meshd's own errors."""
    import docker  # noqa: PLC0415  160 ms of imports that a host without Docker does without
    from docker.errors import APIError, DockerException  # noqa: PLC0415
    from requests.exceptions import RequestException  # noqa: PLC0415

    try:
        # Never a fixed API version: engines from 20.10 to 29 have no common one. The stubs lack a time-out of None.
        client = docker.DockerClient(base_url or os.environ.get("DOCKER_HOST"), timeout=timeout)  # type: ignore[arg-type]
    except (DockerException, RequestException) as error:
        raise MissingError(f"the Docker engine does not answer ({_short(error)}): {_ADVICE}") from error
    try:
        yield client
    except APIError as error:
        raise ApplyError(f"{doing}: {error.explanation or error}") from error
    except (DockerException, RequestException) as error:
        raise MissingError(f"{doing}: the Docker engine does not answer ({_short(error)}): {_ADVICE}") from error
    finally:
        client.close()


def _short(error: Exception) -> str:
    """Return the innermost reason of requests' nested exceptions."""
    text = str(error)
    for reason in ("No such file or directory", "Connection refused", "Permission denied", "timed out"):
        if reason in text:
            return reason.lower()
    return text[:200]


def _network(attributes: dict[str, Any]) -> Network:
    pool = ((attributes.get("IPAM") or {}).get("Config") or [{}])[0]
    options = dict(attributes.get("Options") or {})
    mtu = options.pop(_MTU, "0")
    subnet = IPv4Network(pool.get("Subnet", "0.0.0.0/0"))
    return Network(
        name=str(attributes["Name"]),
        bridge=options.pop(_BRIDGE_NAME, ""),
        subnet=subnet,
        ip_range=IPv4Network(pool.get("IPRange") or subnet),
        gateway=IPv4Address(pool.get("Gateway", "0.0.0.0")),  # noqa: S104  "none", nobody binds to it
        mtu=int(mtu) if mtu.isdigit() else 0,
        options=tuple(sorted(options.items())),
    )


def _containers(attributes: dict[str, Any]) -> Iterator[Container]:
    """Yield the containers on a network that run and have an IPv4 address there."""
    for container in (attributes.get("Containers") or {}).values():
        address = str(container.get("IPv4Address") or "").partition("/")[0]
        if address:
            yield Container(str(container.get("Name")), IPv4Address(address))


def _endpoint(container: dict[str, Any], network: str) -> dict[str, Any]:
    """Return what `docker inspect` says of a container's place on a network."""
    return ((container.get("NetworkSettings") or {}).get("Networks") or {}).get(network) or {}


def _subnets(attributes: dict[str, Any]) -> list[IPv4Network]:
    """Return a network's IPv4 subnets."""
    pools = (attributes.get("IPAM") or {}).get("Config") or []
    return [IPv4Network(pool["Subnet"]) for pool in pools if ":" not in pool.get("Subnet", ":")]


def _foreign(client: Any, network: Any, subnet: IPv4Network) -> Foreign:
    """Return a network with all its containers, also those that do not run."""
    listed = client.api.containers(all=True, filters={"network": network.id})
    names = sorted(str((each.get("Names") or [each.get("Id")])[0]).lstrip("/") for each in listed)
    return Foreign(network.name, subnet, tuple(names), str((network.attrs.get("Labels") or {}).get(_PROJECT, "")))


def _attached(attributes: dict[str, Any]) -> list[str]:
    return sorted(str(container.get("Name")) for container in (attributes.get("Containers") or {}).values())


def _differences(found: Network, wanted: Network) -> str:
    fields = ("subnet", "ip_range", "gateway", "mtu", "bridge", "options")
    return ", ".join(
        f"{field} {getattr(found, field)} instead of {getattr(wanted, field)}"
        for field in fields
        if getattr(found, field) != getattr(wanted, field)
    )
