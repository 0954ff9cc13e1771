"""The Docker network on the bridge, by Docker's SDK.

Docker adopts the bridge that `links` has made, with its address and MTU, and leaves it in place when the network is
removed. Facts of the API: https://docs.docker.com/reference/api/engine/.
"""

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from threading import Event, Thread
from typing import Any, ClassVar

from meshd.errors import ApplyError, ConflictError, InUseError, MeshdError, MissingError
from meshd.net.resources import Action, Change, Engine, Network, Resource, RunningContainer, StoppedContainer

LABEL = "meshd.mesh"
# What meshd has asked Docker for. Where that is what is wanted, and the network differs, asking again does not help.
ASKED = "meshd.asked"
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
# Said at creation alone: since Docker 28 a default of daemon.json can turn IPv6 on, which the overlay is kept free of.
_NO_IPV6 = {"com.docker.network.enable_ipv6": "false"}
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


# A container in these states keeps its place on a network in its settings alone.
STOPPED = ("created", "exited")
# What an endpoint's settings have of the user's; the rest is what Docker made of it while the container ran. Docker
# 20.10 keeps a MAC address with the container, and 28 takes none when it connects one.
_KEPT = ("Aliases", "Links", "DriverOpts", "GwPriority")


class LeftOffError(ApplyError):
    """A container that could not be attached; the text has the command that a user can type."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container, by its id and its name, and what attaching it to a network takes.

    `settings` are those of Docker's EndpointSettings that a user chooses, without the fixed `address`.
    """

    container: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    address: IPv4Address | None = None

    def command(self, network: str) -> str:
        """Return the command that attaches it."""
        kept = self.settings
        options = [f"--alias={alias}" for alias in kept.get("Aliases", ())]
        options += [f"--link={link}" for link in kept.get("Links", ())]
        options += [f"--driver-opt={name}={value}" for name, value in kept.get("DriverOpts", {}).items()]
        options += [f"--gw-priority={kept['GwPriority']}"] if "GwPriority" in kept else []
        options += [f"--ip={self.address}"] if self.address else []
        return shlex.join(["docker", "network", "connect", *options, network, self.name])


class DockerNetwork:
    """The adapter of the mesh's Docker network, which has the name of its bridge, and of containers that lost it.

    A network that is made anew has another ID, and a stopped container starts on the network of the ID that it knows.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"network", "stopped"})

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
            if attributes is None:
                return [*self._lost(client, ())]
            if not self._is_ours(attributes):
                return []  # nor are the containers of somebody else's network ours
            return [_network(attributes), *_containers(attributes), *self._lost(client, {attributes["Id"]})]

    def apply(self, change: Change) -> None:
        resource = change.resource
        with _client(f"{change.action} {resource}", self._base_url, TIMEOUT) as client:
            attributes = self._find(client)
            if isinstance(resource, StoppedContainer):
                self._take_over(client, attributes, change.action, resource)
                return
            assert isinstance(resource, Network)  # noqa: S101  what the dispatch by kind guarantees, for the type checker
            if change.action is Action.REMOVE:
                self._remove(client, attributes)
            elif attributes is None:
                self._create(client, resource)
            elif not self._is_ours(attributes):
                raise ConflictError(self._foreign(attributes, resource.subnet))
            elif (found := _network(attributes).without_additions(resource)) != resource:
                self._replace(client, attributes, found, resource)

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
            return [self._attachment(client, container, str(facts.get("Name"))) for container, facts in attached]

    def stopped(self) -> list[str]:
        """Name the containers that do not run and belong to the network, also to one that has gone."""
        with _client(f"listing the containers of {self.name}", self._base_url) as client:
            return sorted(name for _, name, _ in self._not_running(client))

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
                _connect(client, network.id, attachment)
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

    def _attachment(self, client: Any, container: str, name: str) -> Attachment:
        from docker.errors import NotFound  # noqa: PLC0415  160 ms of imports

        try:
            return _attachment(client.containers.get(container).attrs, self.name)
        except NotFound:
            return Attachment(container, name)

    def _not_running(self, client: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield the ID, the name and the endpoint of each container that does not run and belongs to the network."""
        for found in client.api.containers(all=True, filters={"network": [self.name], "status": list(STOPPED)}):
            if endpoint := _endpoint(found, self.name):  # the filter takes the beginning of a network's ID as well
                yield found["Id"], str((found.get("Names") or [found["Id"][:12]])[0]).lstrip("/"), endpoint

    def _lost(self, client: Any, there: Collection[str]) -> list[StoppedContainer]:
        """Return the stopped containers of the network whose own ID of it is not one of those that are there."""
        return [
            StoppedContainer(container, name, None, _address(endpoint))
            for container, name, endpoint in self._not_running(client)
            if _is_lost(endpoint, there)
        ]

    def _take_over(
        self, client: Any, attributes: dict[str, Any] | None, action: Action, wanted: StoppedContainer
    ) -> None:
        """Have a stopped container start on the network that is there now. It is never off it: connecting replaces.

        Raises LeftOffError.
        """
        from docker.errors import APIError, NotFound  # noqa: PLC0415  160 ms of imports

        if action is Action.REMOVE:
            raise ApplyError(f"{action} {wanted}: taking a container off its network is its owner's")
        if attributes is None or not self._is_ours(attributes):
            raise ApplyError(f"{action} {wanted}: there is no Docker network {self.name} of this mesh")
        # A container may be removed at any time, and is then nobody's loss.
        with suppress(NotFound):
            found = client.containers.get(wanted.id)
            if not _is_lost(_endpoint(found.attrs, self.name), {attributes["Id"]}):
                return  # started, or disconnected by its owner
            attachment = replace(_attachment(found.attrs, self.name), address=wanted.address)
            try:
                _connect(client, attributes["Id"], attachment)
            except APIError as error:
                found.reload()
                if found.status in STOPPED:
                    reason = error.explanation or error
                    raise LeftOffError(
                        f"container {wanted.name} cannot start ({reason}): {attachment.command(self.name)}"
                    ) from error

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
            options={_BRIDGE_NAME: network.bridge, _MTU: str(network.mtu), **_NO_IPV6, **dict(network.options)},
            labels={LABEL: self.mesh, ASKED: _asked(network)},
        )

    def _remove(self, client: Any, attributes: dict[str, Any] | None) -> None:
        if attributes is None or not self._is_ours(attributes):
            return
        if attached := _attached(attributes):
            raise ConflictError(f"containers are attached to the Docker network {self.name}: {', '.join(attached)}")
        client.networks.get(attributes["Id"]).remove()

    def _replace(self, client: Any, attributes: dict[str, Any], found: Network, network: Network) -> None:
        """Make the network again with other settings: Docker cannot change one in place."""
        if (attributes.get("Labels") or {}).get(ASKED) == _asked(network):
            raise ApplyError(
                f"Docker has made the network {self.name} with {_differences(found, network)}, and would do so again: "
                f"see default-network-opts in its daemon.json, then run 'docker network rm {self.name}'"
            )
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
    pool = next(iter(_pools(attributes)), {})
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


def _containers(attributes: dict[str, Any]) -> Iterator[RunningContainer]:
    """Yield the containers on a network that run and have an IPv4 address there."""
    for container in (attributes.get("Containers") or {}).values():
        address = str(container.get("IPv4Address") or "").partition("/")[0]
        if address:
            yield RunningContainer(str(container.get("Name")), IPv4Address(address))


def _endpoint(container: dict[str, Any], network: str) -> dict[str, Any]:
    """Return what `docker inspect` says of a container's place on a network."""
    return ((container.get("NetworkSettings") or {}).get("Networks") or {}).get(network) or {}


def _asked(network: Network) -> str:
    """Return what is asked of Docker for this network, as a label's value."""
    parts = network.bridge, network.subnet, network.ip_range, network.gateway, network.mtu
    return " ".join([*map(str, parts), *map("=".join, network.options)])


def _pools(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a network's IPv4 pools."""
    pools = (attributes.get("IPAM") or {}).get("Config") or []
    return [pool for pool in pools if ":" not in pool.get("Subnet", ":")]


def _address(endpoint: dict[str, Any]) -> IPv4Address | None:
    """Return the fixed address of an endpoint, None where Docker chooses one at each start."""
    text = (endpoint.get("IPAMConfig") or {}).get("IPv4Address")
    return IPv4Address(text) if text else None


def _is_lost(endpoint: dict[str, Any], there: Collection[str]) -> bool:
    """Return whether an endpoint is of a network that is not there. Where it has no ID, Docker goes by the name."""
    return endpoint.get("NetworkID") not in {"", None, *there}


def _attachment(container: dict[str, Any], network: str) -> Attachment:
    """Return how a container is attached to a network, from what `docker inspect` says of it."""
    endpoint = _endpoint(container, network)
    settings = {name: endpoint[name] for name in _KEPT if endpoint.get(name)}
    # Docker adds the short id by itself.
    settings["Aliases"] = [alias for alias in settings.get("Aliases", ()) if alias != container["Id"][:12]]
    return Attachment(container["Id"], str(container["Name"]).lstrip("/"), settings, _address(endpoint))


def _connect(client: Any, network: str, attachment: Attachment) -> None:
    """Attach a container, which replaces what a stopped one has of a network of that name. Raises APIError.

    The SDK's own `connect` knows fewer settings.
    """
    from docker.errors import create_api_error_from_http_exception  # noqa: PLC0415  160 ms of imports
    from requests.exceptions import HTTPError  # noqa: PLC0415

    api = client.api
    config = {**attachment.settings}
    if attachment.address is not None:
        config["IPAMConfig"] = {"IPv4Address": str(attachment.address)}
    answer = api.post(
        f"{api.base_url}/v{api.api_version}/networks/{network}/connect",
        json={"Container": attachment.container, "EndpointConfig": config},
        timeout=api.timeout,
    )
    try:
        answer.raise_for_status()
    except HTTPError as error:
        create_api_error_from_http_exception(error)


def _subnets(attributes: dict[str, Any]) -> list[IPv4Network]:
    """Return a network's IPv4 subnets."""
    return [IPv4Network(pool["Subnet"]) for pool in _pools(attributes)]


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
