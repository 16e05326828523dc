"""`nbdmirror serve --metrics`, as Prometheus asks: the numbers are right, and the endpoint bears bad manners."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdmirror.protocol.constants import CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES
from nbdmirror.units import MiB
from tests.support.activation import listening_unix, passed
from tests.support.daemon import Daemon, run_cli, serving, until
from tests.support.peers import free_port
from tests.support.tools import make_disk, pattern
from tests.support.wire_client import WireClient

if TYPE_CHECKING:
    from collections.abc import Iterator

USAGE = 2
EINVAL, EPERM = 22, 1


class Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


def scrape(connection: http.client.HTTPConnection) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels, in the order of the labels' names."""
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers.get_content_type() == "text/plain"
    text = response.read().decode()
    connection.close()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *dict(sorted(sample.labels.items())).values()): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return make_disk(tmp_path / "disk", 4 * MiB, {0: pattern(MiB)})


@pytest.fixture
def daemon(disk: Path, sock_dir: Path) -> Iterator[Daemon]:
    with serving(disk, "-x", "d", "--metrics", sock_dir / "m", qmp=True) as started:
        yield started


@pytest.fixture
def metrics(sock_dir: Path) -> Unix:
    return Unix(sock_dir / "m")


async def test_what_clients_have_asked_for(daemon: Daemon, metrics: Unix) -> None:
    async with await WireClient.connect_unix(daemon.unix) as client:
        await client.open("d")
        for _ in range(3):
            assert not (await client.ask(CMD_READ, 0, 4096)).error
        assert not (await client.ask(CMD_WRITE, 0, payload=pattern(8192))).error
        assert not (await client.ask(CMD_WRITE, 0, payload=pattern(512), flags=1)).error, "with FUA, by a thread"
        assert not (await client.ask(CMD_TRIM, MiB, MiB)).error
        assert not (await client.ask(CMD_FLUSH)).error
        assert (await client.ask(CMD_READ, 4 * MiB, 512)).error == EINVAL
        assert (await client.ask(999, 0, 1)).error == EINVAL
        found = scrape(metrics)
        assert found["nbdmirror_nbd_connections", "d", "default"] == 1
    requests = {key[3]: value for key, value in found.items() if key[0] == "nbdmirror_nbd_requests_total"}
    lengths = {key[3]: value for key, value in found.items() if key[0] == "nbdmirror_nbd_request_bytes_total"}
    errors = {key[1::3]: value for key, value in found.items() if key[0] == "nbdmirror_nbd_errors_total"}
    assert {op: count for op, count in requests.items() if count} == {
        "read": 4,
        "write": 2,
        "trim": 1,
        "flush": 1,
        "unknown": 1,
    }
    assert {op: length for op, length in lengths.items() if length} == {"read": 12288, "write": 8704, "trim": MiB}
    assert errors == {("EINVAL", "read"): 1, ("EINVAL", "unknown"): 1}
    assert found["nbdmirror_nbd_inflight_requests", "d", "default"] == 0
    assert found["nbdmirror_export_size_bytes", "d", "default"] == 4 * MiB
    assert found["process_start_time_seconds",] > 0
    until(lambda: scrape(metrics)["nbdmirror_nbd_connections", "d", "default"] == 0, "the client has gone")


async def test_what_is_refused_is_counted_with_its_error(disk: Path, sock_dir: Path, metrics: Unix) -> None:
    with serving(disk, "-r", "--metrics", sock_dir / "m") as daemon:
        async with await WireClient.connect_unix(daemon.unix) as client:
            await client.open()
            for _ in range(2):
                assert (await client.ask(CMD_WRITE_ZEROES, 0, 512)).error == EPERM
        assert scrape(metrics)["nbdmirror_nbd_errors_total", "EPERM", "", "default", "write_zeroes"] == 2


def test_exports_of_one_name(daemon: Daemon, metrics: Unix, sock_dir: Path) -> None:
    added = run_cli("export", "add", "--qmp", daemon.control, "-k", sock_dir / "more", "--id", "again", "d")
    assert added.returncode == 0, added.stderr
    found = scrape(metrics)
    assert found["nbdmirror_export_size_bytes", "d", "default"] == 4 * MiB
    assert found["nbdmirror_export_size_bytes", "d", "again"] == 4 * MiB


def test_a_mirror(daemon: Daemon, metrics: Unix, sock_dir: Path) -> None:
    target = make_disk(sock_dir / "target", 4 * MiB, {})
    assert run_cli("mirror", "--qmp", daemon.control, "--job-id", "j", "--speed", "1G", target).returncode == 0
    found = scrape(metrics)
    assert [key[2] for key, value in found.items() if key[0] == "nbdmirror_mirror_state" and value] == ["ready"]
    assert found["nbdmirror_mirror_ready", "j"] == 1
    assert found["nbdmirror_mirror_remaining_bytes", "j"] == 0
    assert found["nbdmirror_mirror_speed_limit_bytes_per_second", "j"] == 1024 * MiB
    sent = {kind: found["nbdmirror_mirror_sent_bytes_total", "j", kind] for kind in ("data", "zero", "skipped")}
    assert (sent["data"], sum(sent.values())) == (MiB, 4 * MiB)
    assert run_cli("cancel", "--force", "--qmp", daemon.control, "j").returncode == 0
    until(lambda: ("nbdmirror_mirror_ready", "j") not in scrape(metrics), "the job has gone")


# --- the endpoint ----------------------------------------------------------------------------------------------------


def test_over_tcp_it_is_for_this_host(disk: Path) -> None:
    port = free_port()
    with serving(disk, "--metrics", str(port)) as daemon:
        found = scrape(http.client.HTTPConnection("127.0.0.1", port, timeout=10))
        assert found["nbdmirror_nbd_connections", "", "default"] == 0
        listening = [line.split()[1] for line in Path(f"/proc/{daemon.pid}/net/tcp").read_text().splitlines()[1:]]
        assert f"0100007F:{port:04X}" in listening


def test_a_socket_that_was_passed(disk: Path, sock_dir: Path, metrics: Unix) -> None:
    with listening_unix(sock_dir / "m") as sock, serving(disk, **passed(sock, names="metrics")) as daemon:
        assert scrape(metrics)["nbdmirror_nbd_connections", "", "default"] == 0
        assert daemon.terminate() == 0
    assert (sock_dir / "m").is_socket(), "it belongs to who made it"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/metrics", 405), ("HEAD", "/metrics", 200), ("GET", "/metrics?a", 200)],
)
def test_what_else_may_be_asked(daemon: Daemon, metrics: Unix, method: str, path: str, status: int) -> None:
    metrics.request(method, path)
    response = metrics.getresponse()
    assert response.status == status, daemon
    assert bool(response.read()) == (method != "HEAD")
    metrics.close()


def test_openmetrics_for_who_asks_for_it(daemon: Daemon, metrics: Unix) -> None:
    metrics.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    response = metrics.getresponse()
    assert response.headers.get_content_type() == "application/openmetrics-text", daemon
    assert response.read().endswith(b"# EOF\n")
    metrics.close()


def test_bad_manners(daemon: Daemon, metrics: Unix, sock_dir: Path) -> None:
    """Silence, floods and garbage: others are answered meanwhile, and the daemon ends without waiting."""
    silent = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for each, said in zip(silent, (b"", b"GET", b"\r\n" * 9, b"x" * 60_000, b"\0\xff\r\n\r\n"), strict=True):
        each.settimeout(10)
        each.connect(str(sock_dir / "m"))
        each.sendall(said)
    assert scrape(metrics)["nbdmirror_nbd_connections", "d", "default"] == 0
    assert daemon.terminate() == 0
    for each in silent:
        each.close()
    assert not (sock_dir / "m").exists()


def test_one_too_many_is_hung_up_on(daemon: Daemon, metrics: Unix, sock_dir: Path) -> None:
    many = [socket.socket(socket.AF_UNIX) for _ in range(17)]
    for each in many:
        each.settimeout(5)  # sooner than the silent are hung up on
        each.connect(str(sock_dir / "m"))
    assert many[-1].recv(1) == b"", daemon
    many[0].close()
    until(lambda: _answers(metrics), "there is room again")
    for each in many:
        each.close()


def _answers(metrics: Unix) -> bool:
    try:
        return bool(scrape(metrics))
    except (OSError, http.client.HTTPException):
        metrics.close()
        return False


@pytest.mark.parametrize("where", ["", "x", "70000", "1.2.3.4:", "host:port"])
def test_where_it_can_not_be(disk: Path, sock_dir: Path, where: str) -> None:
    result = run_cli("serve", disk, "-k", sock_dir / "s", "--metrics", where)
    assert result.returncode == USAGE
    assert f"--metrics '{where}' is neither" in result.stderr
