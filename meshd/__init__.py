"""meshd: containers on many Docker hosts, one flat encrypted network, no central server."""

__version__ = "0.1.0"
