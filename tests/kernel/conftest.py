"""The fixtures of the other real tests, for the guest with Debian's kernel."""

from tests.lab.conftest import lab as lab  # noqa: PLC0414
from tests.netns.conftest import netns_fixture as netns_fixture  # noqa: PLC0414
