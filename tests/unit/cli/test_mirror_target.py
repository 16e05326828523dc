"""What the user typed as a target, as the daemon is told: it has a working directory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nbdmirror.cli.mirror import _endpoint as told
from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def test_relative_names_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert told("disk.img") == str(tmp_path / "disk.img")
    assert told("nbd+unix:///x?socket=sock") == NbdEndpoint.unix(str(tmp_path / "sock"), "x").uri
    assert told("nbd:unix:sock:exportname=x") == NbdEndpoint.unix(str(tmp_path / "sock"), "x").uri


def test_what_is_absolute_stays() -> None:
    assert told("/dev/vdb") == "/dev/vdb"
    assert told("nbd+unix:///?socket=/run/sock") == "nbd+unix:///?socket=/run/sock"
    assert told("nbd://host/disk") == NbdEndpoint.tcp("host", export="disk").uri


@pytest.mark.parametrize("target", ["", "https://example.com/disk", "nbd://host:port:more", "nbd+unix:///"])
def test_what_is_no_target_is_wrong_usage(target: str) -> None:
    with pytest.raises(UsageError):
        told(target)
