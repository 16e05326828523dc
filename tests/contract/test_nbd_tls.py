"""NbdDevice over TLS: verified, or not at all, or not verified because the user said so."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from nbdmirror.devices.nbd import NbdDevice
from nbdmirror.devices.nbd_connection import NbdConnection
from nbdmirror.devices.nbd_link import LinkOptions
from nbdmirror.devices.open import open_device
from nbdmirror.devices.uri import ClientTls, NbdEndpoint
from nbdmirror.errors import UsageError
from tests.support import peers
from tests.support.certificates import Authority
from tests.support.failing import BOUND, failed
from tests.support.links import lost

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("nbd", reason="libnbd's Python binding is not installed")

MIB = 1024**2


async def works(endpoint: NbdEndpoint) -> None:
    connection = await NbdConnection.connect(endpoint)
    await connection.pread(bytearray(MIB), 0)
    await connection.aclose()


async def test_a_shared_key_over_a_unix_socket_and_never_unverified(tmp_path: Path) -> None:
    keys, wrong = tmp_path / "keys.psk", tmp_path / "wrong.psk"
    keys.write_text(f"me:{'ab' * 16}\n")
    wrong.write_text(f"me:{'cd' * 16}\n")
    with peers.nbdkit("memory", "1M", extra=["--tls=require", f"--tls-psk={keys}"]) as peer:
        good = replace(peer.endpoint, tls=ClientTls(psk_file=str(keys), username="me"))
        bad = replace(peer.endpoint, tls=ClientTls(psk_file=str(wrong), username="me"))
        await works(good)
        assert str(bad) in str(await failed(NbdConnection.connect(bad)))
        with pytest.raises(UsageError, match="can't verify"):
            await NbdConnection.connect(replace(peer.endpoint, tls=ClientTls(username="me")))
        await failed(NbdConnection.connect(peer.endpoint))  # in clear: the server wants TLS


async def test_the_servers_certificate_and_its_name_are_verified(tmp_path: Path) -> None:
    ours, others = Authority(tmp_path / "us"), Authority(tmp_path / "them")
    server = ours.server(tmp_path / "server", names="DNS:localhost")
    client, stranger = ours.client(tmp_path / "client"), others.client(tmp_path / "stranger")
    extra = ["--tls=require", f"--tls-certificates={server}", "--tls-verify-peer"]
    with peers.nbdkit("memory", "1M", extra=extra, tcp=True) as peer:
        good = replace(peer.endpoint, host="localhost", tls=ClientTls(str(client)))
        await works(good)
        error = await failed(NbdConnection.connect(replace(good, tls=ClientTls(str(stranger)))))
        assert "not signed by the ca-cert.pem that was given" in str(error)
        await failed(NbdConnection.connect(replace(good, host="127.0.0.1")))


async def test_any_certificate_will_do_where_the_user_says_so(tmp_path: Path) -> None:
    server = Authority(tmp_path / "us").server(tmp_path / "server", names="DNS:elsewhere")
    trusted = Authority(tmp_path / "them").client(tmp_path / "client")
    extra = ["--tls=require", f"--tls-certificates={server}"]
    for tcp in (True, False):
        with peers.nbdkit("memory", "1M", extra=extra, tcp=tcp) as peer:
            strict = replace(peer.endpoint, tls=ClientTls(str(trusted)))
            with pytest.raises(UsageError) if not tcp else pytest.raises(Exception, match="certificate has expired"):
                await NbdDevice.open(strict)
            for uri, verify in ((strict.uri, False), (f"{strict.uri}&tls-verify-peer=false", True)):
                device = await open_device(uri, tls_verify=verify)
                await device.pread(bytearray(MIB), 0)
                await device.aclose()
            await failed(open_device(peer.endpoint.uri, tls_verify=False))  # in clear it does not get any better


async def test_tls_is_not_given_up_when_the_server_has_none() -> None:
    with peers.nbdkit("memory", "1M", tcp=True) as peer:
        for verify in (True, False):
            await failed(NbdConnection.connect(replace(peer.endpoint, host="localhost", tls=ClientTls(verify=verify))))


async def test_reconnecting_is_as_strict_as_connecting(tmp_path: Path) -> None:
    ours, others = Authority(tmp_path / "us"), Authority(tmp_path / "them")
    trusted = ours.client(tmp_path / "client")
    good, rogue = (
        ["--tls=require", f"--tls-certificates={ca.server(tmp_path / name)}"] for ca, name in ((ours, "s"), (others, "r"))
    )
    with peers.nbdkit("memory", "1M", extra=good, tcp=True) as first:
        endpoint = replace(first.endpoint, tls=ClientTls(str(trusted)))
        device = await NbdDevice.open(endpoint, connections=2, link=LinkOptions(reconnect_delay=BOUND))
        first.kill()
        await lost(device)
        held = asyncio.ensure_future(device.pread(bytearray(MIB), 0))
        for extra in (rogue, None):  # somebody else, and somebody without TLS
            with peers.nbdkit("memory", "1M", extra=extra or (), after=first) as second:
                seen = device.link.state
                async with asyncio.timeout(BOUND):
                    while device.link.state == seen:
                        await asyncio.sleep(0.001)
                assert not held.done()
                second.kill()
        with peers.nbdkit("memory", "1M", extra=good, after=first) as third:
            await asyncio.wait_for(held, BOUND)
            third.kill()
        await device.aclose()
