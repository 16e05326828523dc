"""The composition root of `nbdmirror serve`: builds everything, says READY, and takes it apart in order.

Rules:
1. Nothing is reported as ready before it listens; what can't be set up is a UsageError or DeviceError before anything listens.
2. The end, by signal, `quit` or the end of the `--run` command, is one path: jobs are cancelled, clients' accepted requests are
   finished, the disk is flushed, sockets and the pid file are removed.
3. Whatever was created is removed, also when the setting up fails half way.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shlex
import signal
import socket
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from nbdmirror import __version__
from nbdmirror.commands.block import BlockCommands
from nbdmirror.commands.control import ControlCommands
from nbdmirror.commands.job import JobCommands
from nbdmirror.devices.file import FileDevice
from nbdmirror.devices.open import open_device
from nbdmirror.devices.uri import NbdEndpoint
from nbdmirror.errors import DeviceError, NbdMirrorError, UsageError
from nbdmirror.inventory import Inventory, Node
from nbdmirror.protocol.constants import TlsMode
from nbdmirror.qmp.messages import Version
from nbdmirror.qmp.monitor import Monitor
from nbdmirror.qmp.registry import Registry
from nbdmirror.server.access import Access, parse_network
from nbdmirror.server.export import Export
from nbdmirror.server.listener import Listener
from nbdmirror.server.tls import NO_TLS, Tls, certificate_context, psk_context
from nbdmirror.state import ExportedBitmaps, StateOptions, set_up_bitmaps

_log: Final = logging.getLogger(__name__)

# The QEMU whose commands these are (block-job-change and target-is-zero came with 8.2 and 10.1).
QMP_VERSION: Final = Version(10, 1, 0, f"nbdmirror {__version__}")
_JOIN_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` was asked for. Exactly one of `socket_path` and `port` is set."""

    disk: str
    socket_path: str | None = None
    port: int | None = None
    bind: str = "127.0.0.1"
    insecure: bool = False
    export_name: str = ""
    description: str = ""
    read_only: bool = False
    max_clients: int = 0
    node_name: str = "source"
    qmp_paths: tuple[str, ...] = ()
    run: str | None = None
    ready_fd: int | None = None
    pid_file: str | None = None
    tls: TlsMode | None = None
    tls_certificates: str | None = None
    tls_verify_peer: bool = False
    tls_psk: str | None = None
    allow_ip: tuple[str, ...] = ()
    allow_dn: tuple[str, ...] = ()
    state: StateOptions = field(default_factory=StateOptions)


async def serve(options: ServeOptions) -> int:
    """Serve until told to stop; returns the exit status."""
    async with AsyncExitStack() as stack:
        daemon = Daemon(options)
        await daemon.set_up(stack)
        return await daemon.wait()


class Daemon:
    """One disk, its export, its control sockets."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._access = access_of(options)
        self._tls = tls_of(options)
        self._inventory = Inventory()
        self._registry = Registry(QMP_VERSION)
        self._monitor = Monitor(self._registry)
        self._stop = asyncio.Event()
        self._reason = "host-qmp-quit"
        self._exit_status = 0
        self._uri = ""

    async def set_up(self, stack: AsyncExitStack) -> None:
        """Build everything; what is entered into `stack` is undone in reverse order."""
        options, inventory = self._options, self._inventory
        self._check_bind()
        self._check_ready_fd()
        inventory.check_node_name(options.node_name)
        disk = await open_device(options.disk, read_only=options.read_only)
        stack.push_async_callback(self._close_nodes)
        node = inventory.add_node(Node(options.node_name, _driver_of(disk), disk))
        await disk.lock()
        await set_up_bitmaps(stack, node, options.state)
        inventory.exports[options.export_name] = Export(
            options.export_name,
            node.device,
            description=options.description,
            read_only=options.read_only,
            bitmaps=ExportedBitmaps(node, tuple(request.name for request in options.state.bitmaps)),
        )
        BlockCommands(inventory).register(self._registry)
        JobCommands(inventory, self._monitor.emit).register(self._registry)
        ControlCommands(self._stop.set).register(self._registry)
        stack.push_async_callback(self._monitor.aclose)
        listener = self._listener()
        stack.push_async_callback(listener.aclose)
        self._uri = self._endpoint_of(listener).uri
        inventory.own_uris.add(self._uri)
        for path in options.qmp_paths:
            await self._monitor.listen(path)
        stack.push_async_callback(self._end_jobs)
        if options.pid_file is not None:
            _write_pid_file(options.pid_file)
            stack.callback(lambda: Path(options.pid_file or "").unlink(missing_ok=True))
        self._watch_signals()
        await listener.start()
        self._say_ready()

    async def wait(self) -> int:
        """Serve until a signal, `quit`, or the end of the command that was to be run."""
        if self._options.run is None:
            await self._stop.wait()
        else:
            await self._run_command(self._options.run)
        _log.info("shutting down")
        self._monitor.emit("SHUTDOWN", {"guest": False, "reason": self._reason})
        return self._exit_status

    # --- parts -----------------------------------------------------------------------------------------------------

    def _check_bind(self) -> None:
        options = self._options
        required = self._tls.mode is TlsMode.REQUIRE
        if options.port is None or options.insecure or required or _is_loopback(options.bind):
            return
        raise UsageError(
            f"serving on {options.bind} without TLS lets anybody on the network read and write the disk; "
            "bind to 127.0.0.1, require TLS with --tls-certificates, or add --insecure if the network is yours alone"
        )

    def _check_ready_fd(self) -> None:
        number = self._options.ready_fd
        if number is None:
            return
        try:
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise UsageError(f"cannot write to --ready-fd {number}: it is open for reading only")
        except OSError as error:
            raise UsageError(f"cannot write to --ready-fd {number}: {error.strerror}") from None

    def _listener(self) -> Listener:
        options = self._options
        exports, limit, tls = self._inventory.exports, options.max_clients, self._tls
        if options.socket_path is not None:
            return Listener.unix(options.socket_path, exports, max_clients=limit, tls=tls)
        assert options.port is not None, "the command line sees to it that there is a socket or a port"
        return Listener.tcp(options.bind, options.port, exports, max_clients=limit, tls=tls, access=self._access)

    def _endpoint_of(self, listener: Listener) -> NbdEndpoint:
        address, name = listener.address, self._options.export_name
        if isinstance(address, str):
            endpoint = NbdEndpoint.unix(str(Path(address).absolute()), name)
        else:
            endpoint = NbdEndpoint.tcp(*address, name)
        return replace(endpoint, tls=self._tls.mode is TlsMode.REQUIRE)

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._reason = "host-signal"
        self._stop.set()

    def _say_ready(self) -> None:
        line = f"READY {self._uri}\n"
        with suppress(BrokenPipeError):  # past Python's buffer, which would be flushed, and fail, once more at the end
            os.write(sys.stdout.fileno(), line.encode())
        if self._options.ready_fd is not None:
            try:
                os.write(self._options.ready_fd, line.encode())
                os.close(self._options.ready_fd)
            except OSError as error:
                raise UsageError(f"cannot write to --ready-fd {self._options.ready_fd}: {error.strerror}") from None
        _notify_systemd("READY=1")

    async def _run_command(self, command: str) -> None:
        """Run a shell command with the addresses in its environment; its exit status is ours."""
        process = await asyncio.create_subprocess_exec("/bin/sh", "-c", command, env=self._environment())
        ended = asyncio.ensure_future(process.wait())
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not ended.done():
            with suppress(ProcessLookupError):
                process.terminate()
        status = await ended
        self._exit_status = status if status >= 0 else 128 - status
        _log.info("%s ended with status %d", shlex.quote(command), self._exit_status)

    def _environment(self) -> dict[str, str]:
        options = self._options
        environment = {**os.environ, "uri": self._uri, "nbd": self._uri}
        if options.socket_path is not None:
            environment["unixsocket"] = str(Path(options.socket_path).absolute())
        if options.qmp_paths:
            environment["qmp"] = environment["control"] = str(Path(options.qmp_paths[0]).absolute())
        return environment

    async def _end_jobs(self) -> None:
        for job in list(self._inventory.jobs.values()):
            with suppress(NbdMirrorError):
                job.cancel()
        for job in list(self._inventory.jobs.values()):
            with suppress(TimeoutError):
                async with asyncio.timeout(_JOIN_SECONDS):
                    await job.join()

    async def _close_nodes(self) -> None:
        for node in self._inventory.nodes.values():
            try:
                if not node.is_read_only:
                    async with asyncio.timeout(_JOIN_SECONDS):
                        await node.disk.flush()
            except (DeviceError, TimeoutError) as error:
                _log.error("what was written last may not be durable: %s", error or f"{node.disk.name} does not answer")
                self._exit_status = self._exit_status or 1
            await node.disk.aclose()


def tls_of(options: ServeOptions) -> Tls:
    """How to speak TLS, if at all. Who names certificates or keys wants TLS required, unless they say otherwise."""
    has_identity = options.tls_certificates is not None or options.tls_psk is not None
    mode = options.tls or (TlsMode.REQUIRE if has_identity else TlsMode.OFF)
    if options.tls_certificates is not None and options.tls_psk is not None:
        raise UsageError("--tls-certificates and --tls-psk exclude each other")
    if mode is TlsMode.OFF and has_identity:
        raise UsageError("--tls off contradicts --tls-certificates and --tls-psk; leave one of them out")
    if mode is not TlsMode.OFF and not has_identity:
        raise UsageError(f"--tls {mode.value} needs --tls-certificates DIR or --tls-psk FILE")
    if options.tls_verify_peer and options.tls_certificates is None:
        raise UsageError("--tls-verify-peer verifies certificates: it needs --tls-certificates DIR")
    if options.tls_certificates is not None:
        return Tls(mode, certificate_context(options.tls_certificates, verify_peer=options.tls_verify_peer))
    return NO_TLS if options.tls_psk is None else Tls(mode, psk_context(options.tls_psk))


def access_of(options: ServeOptions) -> Access:
    """Who may connect. What would let somebody past a list is refused."""
    if options.allow_ip and options.port is None:
        raise UsageError("--allow-ip goes with TCP: clients of a Unix socket have no address")
    if options.allow_dn and not options.tls_verify_peer:
        raise UsageError("--allow-dn looks at clients' certificates: it needs --tls-verify-peer")
    if options.allow_dn and options.tls is TlsMode.ON:
        raise UsageError("--allow-dn needs --tls require: with --tls on, clients may come without a certificate")
    return Access(tuple(map(parse_network, options.allow_ip)), options.allow_dn)


def _driver_of(disk: object) -> str:
    if not isinstance(disk, FileDevice):
        return "nbd"
    return "host_device" if disk.is_block else "file"


def _is_loopback(host: str) -> bool:
    """Whether every address of `host` is this machine's own; one that has none is refused by who listens on it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return True
    return all(str(address[4][0]).startswith("127.") or address[4][0] == "::1" for address in found)


def _write_pid_file(path: str) -> None:
    try:
        Path(path).write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise UsageError(f"cannot write the pid file '{path}': {error.strerror}") from None


def _notify_systemd(state: str) -> None:
    """sd_notify(3): one datagram to the socket that the service manager named, if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
