from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdmirror.devices.uri import ClientTls, NbdEndpoint, looks_like_uri, parse_endpoint
from nbdmirror.errors import UsageError
from nbdmirror.sockets import MAX_SOCKET_PATH

TCP = NbdEndpoint.tcp
UNIX = NbdEndpoint.unix


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("nbd://host", TCP("host")),
        ("nbd://host/", TCP("host")),
        ("nbd://", TCP("localhost")),
        ("NBD://Host:1234/Disk", TCP("Host", 1234, "Disk")),
        ("nbd+tcp://host:10809/disk", TCP("host", 10809, "disk")),
        ("nbd://host:/disk", TCP("host", 10809, "disk")),
        ("nbd://h//disk", TCP("h", export="/disk")),
        ("nbd://h/a/b", TCP("h", export="a/b")),
        ("nbd://h/a%2Fb%20c%3F", TCP("h", export="a/b c?")),
        ("nbd://h/%C3%BC", TCP("h", export="ü")),
        ("nbd://h/a+b", TCP("h", export="a+b")),
        ("nbd://[::1]/x", TCP("::1", export="x")),
        ("nbd://[fe80::1%25eth0]:7/x", TCP("fe80::1%eth0", 7, "x")),
        ("nbd://h/x?x-debug=1&x-other", TCP("h", export="x")),
        ("nbds://me@h/x", NbdEndpoint("tcp", "h", 10809, export="x", tls=ClientTls(username="me"))),
        (
            "nbds://h/?tls-certificates=/etc/pki&tls-verify-peer=1&tls-hostname=other",
            NbdEndpoint("tcp", "h", 10809, tls=ClientTls(certificates="/etc/pki", hostname="other")),
        ),
        (
            "nbds://me@h/?tls-type=PSK&tls-psk-file=/k",
            NbdEndpoint("tcp", "h", 10809, tls=ClientTls(username="me", psk_file="/k")),
        ),
        ("nbds://h/?tls-type=x509", NbdEndpoint("tcp", "h", 10809, tls=ClientTls())),
        ("nbds://h/?tls-verify-peer=false", NbdEndpoint("tcp", "h", 10809, tls=ClientTls(verify=False))),
        ("nbds://h/?tls-verify-peer=0", NbdEndpoint("tcp", "h", 10809, tls=ClientTls(verify=False))),
        ("nbd+unix:///?socket=/run/nbd.sock", UNIX("/run/nbd.sock")),
        ("nbd+unix://?socket=/run/nbd.sock", UNIX("/run/nbd.sock")),
        ("nbd+unix:///disk?socket=rel/s", UNIX("rel/s", "disk")),
        ("nbd+unix:////disk?socket=/s", UNIX("/s", "/disk")),
        ("nbd+unix:///?socket=/a%26b%20c+d", UNIX("/a&b c+d")),
        ("nbd+unix:///?socket=/%ff", UNIX("/\udcff")),
        (
            "nbds+unix://me@/x?tls-psk-file=/keys.psk&socket=/s",
            NbdEndpoint("unix", socket="/s", export="x", tls=ClientTls(username="me", psk_file="/keys.psk")),
        ),
        ("nbd+vsock://3:99999/x", NbdEndpoint("vsock", "3", 99999, export="x")),
        ("nbd+vsock:///x", NbdEndpoint("vsock", "2", 10809, export="x")),
        ("nbd:host:10810:exportname=drive-scsi0", TCP("host", 10810, "drive-scsi0")),
        ("nbd:host:10810", TCP("host", 10810)),
        ("nbd:[::1]:10810:exportname=a:b", TCP("::1", 10810, "a:b")),
        ("nbd:unix:/run/q/1_nbd.migrate:exportname=drive-%41", UNIX("/run/q/1_nbd.migrate", "drive-%41")),
        ("nbd:unix:/run/sock", UNIX("/run/sock")),
    ],
)
def test_what_is_understood(text: str, endpoint: NbdEndpoint) -> None:
    assert looks_like_uri(text)
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("nbd+unix:///disk", "add ?socket=PATH"),
        ("nbd+unix:///disk?socket=", "add ?socket=PATH"),
        ("nbd+unix://disk?socket=/s", "three slashes"),
        ("nbd://h/x?socket=/s", "nbd+unix:///"),
        ("nbds://h/?tls-certficates=/etc", "unknown parameter 'tls-certficates'"),
        ("nbd://h/?tls-certificates=/etc", "nbds://"),
        ("nbds://h/?tls-type=anon", "tls-type=anon is not possible"),
        ("nbds://h/?tls-type=psk", "tls-psk-file=FILE"),
        ("nbds://h/?tls-type=x509&tls-psk-file=/k", "tls-type=x509 is not possible"),
        ("nbd://h/?tls-type=x509", "nbds://"),
        ("nbds://h/?tls-verify-peer=never", "true or false"),
        ("nbds://h/?tls-verify-peer=", "true or false"),
        ("nbd://h/?tls-verify-peer=0", "nbds://"),
        ("nbd+unix:///?socket=/a&socket=/b", "given twice"),
        ("nbd://h:0/", "0 is not a port"),
        ("nbd://h:70000/", "70000 is not a port"),
        ("nbd://h:port/", "HOST:PORT"),
        ("nbd://::1/x", "[::1]"),
        ("nbd://me:secret@h/", "no passwords"),
        ("nbd://h/a%2", "%25"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/%ff", "UTF-8"),
        ("nbd://h/a#b", "%23"),
        ("nbd+ssh://h/x", "nbd+ssh"),
        ("nbds:h:1", "write nbd://"),
        ("nbd+vsock://host/", "CID"),
        ("nbd:host", "nbd:HOST:PORT"),
        ("nbd:unix:", "nbd:HOST:PORT"),
        ("nbd:host:x:exportname=y", "nbd:HOST:PORT"),
        ("nbd+unix:///?socket=/" + "s" * MAX_SOCKET_PATH, "the system takes 107"),
        ("nbd://h/" + "x" * 4097, "4096 bytes"),
    ],
)
def test_what_is_refused_says_why_in_one_line(text: str, remedy: str) -> None:
    assert looks_like_uri(text)
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["disk.img", "/dev/nbd0", "./nbd:x", "http://h/x", "nbd.img", "file:///nbd:"])
def test_a_path_is_not_an_endpoint(text: str) -> None:
    assert not looks_like_uri(text)


@pytest.mark.parametrize(
    ("endpoint", "uri"),
    [
        (TCP("host"), "nbd://host:10809"),
        (TCP("::1", 7, "a/b c"), "nbd://[::1]:7/a/b%20c"),
        (TCP("h", 7, "/disk"), "nbd://h:7//disk"),
        (UNIX("/run/s"), "nbd+unix:///?socket=/run/s"),
        (UNIX("/run/a&b", "ü?"), "nbd+unix:///%C3%BC%3F?socket=/run/a%26b"),
        (NbdEndpoint("vsock", "3", 5), "nbd+vsock://3:5"),
    ],
)
def test_the_preferred_uri(endpoint: NbdEndpoint, uri: str) -> None:
    assert endpoint.uri == str(endpoint) == uri


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
paths = names.filter(lambda text: 0 < len(text.encode()) <= MAX_SOCKET_PATH)


credentials = st.builds(ClientTls, names, psk_file=names, username=names, hostname=names, verify=st.booleans())


@given(path=paths, export=names, tls=st.none() | credentials)
def test_the_uri_of_a_unix_endpoint_reads_back(path: str, export: str, tls: ClientTls | None) -> None:
    endpoint = NbdEndpoint("unix", socket=path, export=export, tls=tls)
    assert parse_endpoint(endpoint.uri) == endpoint


@given(host=st.sampled_from(["h", "10.0.0.1", "::1", "fe80::1%eth0"]), port=st.integers(1, 65535), export=names)
def test_the_uri_of_a_tcp_endpoint_reads_back(host: str, port: int, export: str) -> None:
    endpoint = TCP(host, port, export)
    assert parse_endpoint(endpoint.uri) == endpoint


@given(st.text().map(lambda rest: "nbd" + rest))
def test_any_text_gives_an_endpoint_or_a_usage_error(text: str) -> None:
    try:
        parse_endpoint(text)
    except UsageError:
        return


def test_neither_uris_nor_memory_need_libnbd() -> None:
    code = "import sys, nbdmirror.devices.uri, nbdmirror.devices.memory; sys.exit('nbd' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
