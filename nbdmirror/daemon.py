"""The composition root of `nbdmirror serve`: builds everything, says READY, and takes it apart in order.

Rules:
1. Nothing is reported as ready before it listens; what can't be set up is a UsageError or DeviceError before anything listens.
2. The end, by signal, `quit`, the end of the `--run` command or of the parent process, is one path: jobs are cancelled,
   clients' accepted requests are finished, the disks are flushed, sockets and the pid file are removed.
3. Whatever was created is removed, also when the setting up fails half way.
4. A reload, by SIGHUP, is checked whole before anything changes. What was wrong, and what can't change, is logged.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shlex
import signal
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdmirror import __version__, systemd
from nbdmirror.commands.bitmap import BitmapCommands
from nbdmirror.commands.bitmap_actions import BitmapActions
from nbdmirror.commands.block import BlockCommands
from nbdmirror.commands.control import ControlCommands
from nbdmirror.commands.export import ExportCommands
from nbdmirror.commands.job import JobCommands
from nbdmirror.commands.mirror import MirrorCommands
from nbdmirror.commands.nbd_server import NbdServerCommands
from nbdmirror.commands.object import ObjectCommands
from nbdmirror.commands.saved_jobs import SavedJobs
from nbdmirror.commands.transaction import TransactionCommands
from nbdmirror.disks import Disks
from nbdmirror.errors import DeviceError, NbdMirrorError, UsageError
from nbdmirror.heartbeat import Heartbeat, interval_of
from nbdmirror.inventory import Inventory
from nbdmirror.launch import check_writable, pid_file, tell_background, write_line
from nbdmirror.qmp.messages import Version
from nbdmirror.qmp.monitor import Monitor
from nbdmirror.qmp.registry import Registry
from nbdmirror.server.listener import Listener, allow_many_files
from nbdmirror.serving import FIXED, access_of, check_exposure, check_names, server_sockets, tls_of
from nbdmirror.state import set_up_bitmaps

if TYPE_CHECKING:
    from nbdmirror.devices.uri import NbdEndpoint
    from nbdmirror.serving import ServeOptions, Source

_log: Final = logging.getLogger(__name__)

# The QEMU whose commands these are (block-job-change and target-is-zero came with 8.2 and 10.1).
QMP_VERSION: Final = Version(10, 1, 0, f"nbdmirror {__version__}")
_JOIN_SECONDS: Final = 10.0


async def serve(options: ServeOptions, source: Source | None = None) -> int:
    """Serve until told to stop; returns the exit status. Where there is a `source`, SIGHUP asks it for other options."""
    allow_many_files()
    async with AsyncExitStack() as stack:
        daemon = Daemon(options, source)
        await daemon.set_up(stack)
        await daemon.wait()
    return daemon.exit_status


class Daemon:
    """The disks, their exports, the control sockets."""

    def __init__(self, options: ServeOptions, source: Source | None) -> None:
        check_names(options)
        self._options = options
        self._source = source
        self._access = access_of(options)
        self._tls = tls_of(options)
        self._inventory = Inventory()
        self._disks = Disks(self._inventory)
        self._registry = Registry(QMP_VERSION)
        self._monitor = Monitor(self._registry)
        self._stop = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._reason = "host-qmp-quit"
        self.exit_status = 0  # also of what fails at the end
        self._endpoints: list[NbdEndpoint] = []
        self._served_uris: set[str] = set()
        self._saved: SavedJobs | None = None
        self._mirrors: MirrorCommands
        interval = interval_of(os.environ)
        self._heartbeat = None if interval is None else Heartbeat(self._status, interval)

    async def set_up(self, stack: AsyncExitStack) -> None:
        """Build everything; what is entered into `stack` is undone in reverse order."""
        options, inventory = self._options, self._inventory
        check_exposure(options, self._tls)
        if options.ready_fd is not None:
            check_writable(options.ready_fd)
        if options.log_level is not None:
            logging.getLogger().setLevel(options.log_level.upper())
        if self._heartbeat is not None:
            stack.callback(self._heartbeat.stop)  # last of all
        stack.push_async_callback(self._close_nodes)
        await self._disks.serve(options.disks)
        self._watch(stack)  # before there is anything that a signal could leave behind
        await self._set_up_state(stack)
        self._mirrors = MirrorCommands(inventory, self._monitor.emit, self._saved)
        exports = self._register_commands()
        stack.push_async_callback(self._mirrors.aclose)
        stack.push_async_callback(self._monitor.aclose)
        listener = self._listen(stack)
        stack.push_async_callback(exports.aclose)
        for path in options.qmp_paths:
            await self._monitor.listen(path)
        for passed in options.activated.control:
            await self._monitor.listen_on(passed)
        stack.push_async_callback(self._end_jobs)
        await self._serve_metrics(stack)
        if options.pid_file is not None:
            stack.enter_context(pid_file(options.pid_file))
        if self._source is not None:
            self._reload_at_hangup(stack, self._source, listener)
        await listener.start()
        self._mirrors.resume_all(options.resume)
        self._say_ready()

    async def _set_up_state(self, stack: AsyncExitStack) -> None:
        """The bitmaps and the saved jobs, which only a disk that is alone has."""
        options, inventory = self._options, self._inventory
        if not options.keeps_bitmaps:
            return
        node = inventory.node(options.disks[0].node_name)
        stores = await set_up_bitmaps(stack, node, options.state)
        inventory.keeper = stores or inventory.keeper
        if options.state.directory is not None and not node.is_read_only:
            self._saved = SavedJobs.open(options.state.directory)

    def _register_commands(self) -> ExportCommands:
        registry, inventory, emit = self._registry, self._inventory, self._monitor.emit
        actions = BitmapActions(inventory)
        exports = ExportCommands(inventory, emit)
        for commands in (
            BlockCommands(inventory),
            BitmapCommands(inventory, actions),
            TransactionCommands(inventory, actions),
            exports,
            NbdServerCommands(inventory, exports),
            ObjectCommands(inventory),
            JobCommands(inventory),
            self._mirrors,
            ControlCommands(registry, self._stop.set),
        ):
            commands.register(registry)
        return exports

    async def wait(self) -> None:
        """Serve until a signal, `quit`, or the end of the command that was to be run."""
        if self._options.run is None:
            await self._stop.wait()
        else:
            await self._run_command(self._options.run)
        _log.info("shutting down")
        if self._heartbeat is not None:
            self._heartbeat.ending()
        self._monitor.emit("SHUTDOWN", {"guest": False, "reason": self._reason})

    # --- parts -----------------------------------------------------------------------------------------------------

    def _listen(self, stack: AsyncExitStack) -> Listener:
        options = self._options
        sockets, limit = server_sockets(options), options.max_clients
        listener = Listener(sockets, self._disks.exports, max_clients=limit, tls=self._tls, access=self._access)
        stack.push_async_callback(listener.aclose)
        self._endpoints = listener.endpoints(options.disks[0].export_name)
        self._note_uris()
        return listener

    def _status(self) -> str:
        """What there is, on a line."""
        exports = [each.export for each in self._inventory.exports.values()]
        parts = [f"exports: {len(exports)}", f"clients: {sum(len(export.sessions) for export in exports)}"]
        parts += [f"job {job.id}: {job.status}" for job in self._inventory.jobs.values()]
        return ", ".join(parts)

    async def _serve_metrics(self, stack: AsyncExitStack) -> None:
        options = self._options
        if options.metrics is None and not options.activated.metrics:
            return
        from nbdmirror.metrics import collector, endpoint  # noqa: PLC0415  only who wants it waits for it

        registry = collector.registry(self._inventory)
        sockets = options.activated.metrics or [endpoint.listen(str(options.metrics))]
        metrics = endpoint.MetricsEndpoint(registry, sockets)
        stack.push_async_callback(metrics.aclose)
        await metrics.start()

    def _note_uris(self) -> None:
        """Let the inventory know where the disks' exports can be reached; the NBD server's it knows."""
        inventory = self._inventory
        uris = {name: [replace(each, export=name).uri for each in self._endpoints] for name in self._disks.exports}
        inventory.own_uris -= self._served_uris
        self._served_uris = {uri for found in uris.values() for uri in found}
        inventory.own_uris |= self._served_uris
        for each in inventory.exports.values():
            if each.server is None:
                each.uri = uris[each.export.name][0]

    @property
    def _uri(self) -> str:
        """Where the first disk is served, at the first place where there are several."""
        return self._endpoints[0].uri

    def _watch(self, stack: AsyncExitStack) -> None:
        """From now on signals, and the end of the parent where that matters, lead to the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        parent = self._options.parent_fd
        if parent is not None:
            loop.add_reader(parent, self._on_parent_gone)
            stack.callback(loop.remove_reader, parent)

    def _on_parent_gone(self) -> None:
        _log.warning("the parent process has ended")
        self._on_signal()

    def _on_signal(self) -> None:
        self._reason = "host-signal"
        self._stop.set()

    # --- reloading -------------------------------------------------------------------------------------------------

    def _reload_at_hangup(self, stack: AsyncExitStack, source: Source, listener: Listener) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload_wanted.set)
        task = asyncio.get_running_loop().create_task(self._keep_reloading(source, listener))

        async def end() -> None:
            task.cancel()
            await asyncio.wait((task,))

        stack.push_async_callback(end)

    async def _keep_reloading(self, source: Source, listener: Listener) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            systemd.notify_reloading()
            try:
                with source.blamed():
                    await self._reload(source.read(), listener)
            except NbdMirrorError as error:
                _log.error("reload: everything stays as it was: %s", error)
            except Exception:
                _log.exception("reload: failed because of a fault in nbdmirror")
            systemd.notify("READY=1")

    async def _reload(self, wanted: ServeOptions, listener: Listener) -> None:
        """Do as these options say from now on; raises NbdMirrorError, and then nothing has changed."""
        check_names(wanted)
        access, tls = access_of(wanted), tls_of(wanted)
        check_exposure(wanted, tls)
        if wanted.keeps_bitmaps and self._disks.would_change(wanted.disks):
            raise UsageError("--state-dir and -B are for the disk that the daemon was started with; restart it for another")
        await self._disks.serve(wanted.disks)
        fixed = [name for field, name in FIXED.items() if getattr(wanted, field) != getattr(self._options, field)]
        if tls.mode is self._tls.mode:
            self._tls = tls
        else:
            fixed.append("tls.mode")
        for name in fixed:
            _log.warning("reload: %s counts from the next start on", name)
        self._access = access
        listener.change(max_clients=wanted.max_clients, tls=self._tls, access=access)
        if wanted.log_level is not None:
            logging.getLogger().setLevel(wanted.log_level.upper())
        self._note_uris()
        _log.info("reloaded; exports: %s", ", ".join(map(repr, self._disks.exports)))

    # --- parts -----------------------------------------------------------------------------------------------------

    def _say_ready(self) -> None:
        line, options = f"READY {self._uri}\n", self._options
        if options.ready_fd is not None:
            try:
                write_line(options.ready_fd, line)
            except OSError as error:
                raise UsageError(f"cannot write to --ready-fd {options.ready_fd}: {error.strerror}") from None
        if options.background_fd is not None:
            tell_background(options.background_fd, line)  # which says it on standard output
        elif options.activated.is_captive:
            _log.info("serving %s", self._uri)  # standard output is the client's: `nbdinfo --json`, `nbdcopy ... -`
        else:
            with suppress(BrokenPipeError):  # past Python's buffer, which would be flushed, and fail, once more at the end
                os.write(1, line.encode())
        if self._heartbeat is not None:
            self._heartbeat.start()

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
        self.exit_status = status if status >= 0 else 128 - status
        _log.info("%s ended with status %d", shlex.quote(command), self.exit_status)

    def _environment(self) -> dict[str, str]:
        """Our own, with the addresses; without what would let the command speak to the service manager in our name."""
        environment = {**os.environ, "uri": self._uri, "nbd": self._uri}
        environment.pop("NOTIFY_SOCKET", None)
        sockets = [endpoint.socket for endpoint in self._endpoints if endpoint.socket]
        if sockets:
            environment["unixsocket"] = sockets[0]
        controls = [str(Path(path).absolute()) for path in self._options.qmp_paths]
        controls += [str(passed.sock.getsockname()) for passed in self._options.activated.control]
        if controls:
            environment["qmp"] = environment["control"] = controls[0]
        return environment

    async def _end_jobs(self) -> None:
        await self._mirrors.keep_saved()
        for job in list(self._inventory.jobs.values()):
            with suppress(NbdMirrorError):
                job.cancel()
        for job in list(self._inventory.jobs.values()):
            with suppress(TimeoutError):
                async with asyncio.timeout(_JOIN_SECONDS):
                    await job.join()

    async def _close_nodes(self) -> None:
        for node in self._inventory.nodes.values():
            if node.child is not None:
                continue
            try:
                if node.disk.is_away:  # and is not waited for at the end
                    raise DeviceError(errno.ENOTCONN, node.disk.name)
                if not node.disk.capabilities.read_only:
                    async with asyncio.timeout(_JOIN_SECONDS):
                        await node.disk.flush()
            except (DeviceError, TimeoutError) as error:
                _log.error("what was written last may not be durable: %s", error or f"{node.disk.name} does not answer")
                self.exit_status = self.exit_status or 1
            await node.disk.aclose()
