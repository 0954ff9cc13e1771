"""The lab's container images, built on each host without a registry."""

from pathlib import Path

from meshd.lab.hosts import LabHost


def folder() -> Path:
    """Return the folder of the images: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "images"
    return inside if inside.is_dir() else package.parent / "images"


def build(host: LabHost, image: str = "serf") -> None:
    """Build an image on a host's engine, as `meshd/NAME`. Raises MeshdError with what the script says."""
    host.run(["sh", str(folder() / image / "build")], timeout=180)
