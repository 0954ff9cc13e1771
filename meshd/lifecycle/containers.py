"""The containers on the overlay, which some commands take off it and put back."""

from collections.abc import Callable, Iterable

from meshd.errors import ConflictError, MeshdError
from meshd.net.docker import Attachment, DockerNetwork
from meshd.state.settings import Settings


def attach(bridge: DockerNetwork, containers: Iterable[Attachment], say: Callable[[str], None]) -> list[str]:
    """Attach containers again, each whatever becomes of the others; return the names of those that are left off."""
    off, told = [], []
    for container in containers:
        try:
            if address := bridge.attach(container):
                told.append(f"container {container.name} has the address {address}")
        except MeshdError as error:
            off.append(container.name)
            told.append(f"container {container.name} is off the overlay ({error}): {container.command(bridge.name)}")
    # Only now: the terminal may be closed.
    for text in told:
        say(text)
    return off


def disconnect(settings: Settings, containers: list[Attachment]) -> None:
    if containers:
        DockerNetwork(settings.mesh, settings.bridge).disconnect(containers)


def attached_containers(settings: Settings, *, force: bool) -> list[Attachment]:
    """Return the containers that are attached, which `force` is to disconnect; without it, refuse if there are any."""
    if not settings.docker:
        return []
    try:
        attached = DockerNetwork(settings.mesh, settings.bridge).attachments()
    except MeshdError:
        return []  # no engine, no running containers
    if attached and not force:
        raise ConflictError(
            f"containers are attached to {settings.bridge}: {', '.join(sorted(c.name for c in attached))}; "
            "stop them, or pass --force to disconnect them"
        )
    return attached


def stopped_containers(settings: Settings) -> str:
    """Name the stopped containers of the Docker network; the empty string if there are none, or no engine answers."""
    if not settings.docker:
        return ""
    try:
        return ", ".join(DockerNetwork(settings.mesh, settings.bridge).stopped())
    except MeshdError:
        return ""
