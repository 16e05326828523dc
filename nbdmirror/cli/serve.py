"""`nbdmirror serve`: export a disk and track its writes. qemu-nbd's short flags, nbdkit's names for TLS.

Rules:
1. A parameter has the name of its first long option, so that every option's environment variable can be guessed from it:
   NBDMIRROR_SERVE_EXPORT_NAME is --export-name.
2. The sockets of a service manager are taken, and a process is forked, before there is an event loop.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click
import uvloop
from click.core import ParameterSource

from nbdmirror.cli.bitmap_options import state_options
from nbdmirror.cli.logs import level_was_given, log_options
from nbdmirror.cli.options import WORD
from nbdmirror.commands.saved_jobs import Resume
from nbdmirror.config import read as read_config
from nbdmirror.daemon import serve as run_daemon
from nbdmirror.errors import UsageError
from nbdmirror.launch import into_background, open_parent
from nbdmirror.protocol.constants import TlsMode
from nbdmirror.serving import DEFAULT_NODE_NAME, DiskOptions, ServeOptions, parse_vsock
from nbdmirror.systemd import take_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdmirror.config import Config
    from nbdmirror.systemd import Activated

_BY_THE_USER: Final = frozenset((ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT))
_LOG_LEVEL: Final = "warning"  # where neither the command line nor the file says one
# The options of a disk; with several disks they are in the configuration file.
_OF_A_DISK: Final = frozenset(("disk", "export_name", "description", "read_only", "node_name"))


class _Vsock(click.ParamType[tuple[int | None, int]]):
    """[CID:]PORT."""

    name = "vsock"

    def convert(
        self,
        value: Any,  # noqa: ANN401
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[int | None, int]:
        """See click."""
        if isinstance(value, tuple):
            return value
        try:
            return parse_vsock(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


@click.command("serve", short_help="Export a disk and track its writes.")
@click.argument("disk", required=False)
@click.option("--config", metavar="FILE", help="Read FILE, in TOML; options win. SIGHUP reads it again.")
@click.option("-k", "--socket", "--unix", metavar="PATH", help="Listen on a Unix socket.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), help="Listen on TCP; 0 lets the kernel choose.  [default: 10809]")
@click.option("-b", "--bind", "--ipaddr", metavar="ADDR", help="The TCP address.  [default: 127.0.0.1]")
@click.option("--vsock", type=_Vsock(), metavar="[CID:]PORT", help="Listen on a vsock: for virtual machines and their host.")
@click.option("--insecure", is_flag=True, help="Serve other hosts though TLS is not required.")
@click.option(
    "--tls",
    type=click.Choice([mode.value for mode in TlsMode]),
    help="Whether clients may or must use TLS.  [default: require with certificates or keys, else off]",
)
@click.option(
    "--tls-certificates",
    "--tls-creds",
    metavar="DIR",
    help="Where server-cert.pem, server-key.pem, ca-cert.pem, ca-crl.pem are.",
)
@click.option("--tls-verify-peer", is_flag=True, help="Clients need a certificate signed by ca-cert.pem.")
@click.option("--tls-psk", metavar="FILE", help="Pre-shared keys, USER:HEXKEY a line, instead of certificates (Python 3.13).")
@click.option("--allow-ip", type=WORD, multiple=True, metavar="CIDR", help="Serve clients from that network only; repeatable.")
@click.option(
    "--allow-dn", type=WORD, multiple=True, metavar="PATTERN", help="Serve certificates for CN=...,O=... only; repeatable."
)
@click.option("-x", "--export-name", default="", metavar="NAME", help='The export\'s name.  [default: ""]')
@click.option("-D", "--description", default="", metavar="TEXT", help="What clients are told of the export.")
@click.option("-r", "--read-only", is_flag=True, help="Refuse writes.")
@click.option("-e", "--shared", type=click.IntRange(0), default=0, metavar="N", help="At most N clients, 0: any.")
@click.option(
    "-t", "--persistent", is_flag=True, expose_value=False, help="Go on when the last client has left, which it does anyway."
)
@click.option("--node-name", default=DEFAULT_NODE_NAME, show_default=True, help="The disk's name in the control language.")
@click.option("--qmp", type=WORD, multiple=True, metavar="PATH", help="A control socket (QMP); repeatable.")
@click.option("--metrics", metavar="WHERE", help="Metrics for Prometheus at [ADDR:]PORT (ADDR 127.0.0.1), or a socket's path.")
@state_options
@click.option(
    "--resume",
    type=click.Choice([how.value for how in Resume]),
    default=Resume.AUTO.value,
    show_default=True,
    help="Mirror jobs in the state directory: go on with them, have them wait for `resume`, or compare what was copied first.",
)
@click.option("--run", metavar="COMMAND", help="Run COMMAND with $uri and $qmp set; stop when it ends, with its status.")
@click.option("--fork", is_flag=True, help="Return once it listens, and go on in the background.")
@click.option("--exit-with-parent", is_flag=True, help="Stop when the process that started it ends.")
@click.option("--ready-fd", type=click.IntRange(0), metavar="N", help="Write a line READY URI to this file descriptor, too.")
@click.option("-P", "--pid-file", "--pidfile", metavar="PATH", help="Write the process id there once listening.")
@log_options
@click.pass_context
def serve(context: click.Context, /, *, config: str | None, fork: bool, exit_with_parent: bool, **said: Any) -> int:  # noqa: ANN401
    """Export DISK (a raw file, a block device or an NBD URI), or what a configuration file lists, and track its writes.

    Prints "READY URI" once it listens; SIGTERM and SIGINT stop it cleanly. Sockets that a service manager passes
    (LISTEN_FDS), named nbd, control or metrics, are used instead of those that -k, -p and --vsock would make.
    """
    activated = take_sockets(os.environ)
    parent_fd = open_parent() if exit_with_parent else None
    for is_set, why in (
        (said["run"] is not None, "--run ends with its command"),
        (exit_with_parent, "--exit-with-parent is for who stays"),
        (activated, "whoever passed a socket waits for this process"),
    ):
        if fork and is_set:
            raise UsageError(f"no --fork here: {why}")
    source = _Source(context, said, config, activated)
    with source.blamed():
        options = replace(source.read(), parent_fd=parent_fd, background_fd=into_background() if fork else None)
        return uvloop.run(run_daemon(options, None if config is None else source))


class _Source:
    """The options: of the command line, over those of the configuration file, if there is one, as it is when it is read."""

    def __init__(self, context: click.Context, said: dict[str, Any], path: str | None, activated: Activated) -> None:
        self._said = said
        self._given = {name: value for name, value in said.items() if context.get_parameter_source(name) in _BY_THE_USER}
        self._logs_as_told = level_was_given(context)
        self._path = path
        self._activated = activated
        self._config: Config | None = None

    def read(self) -> ServeOptions:
        """Read the file, again; raises UsageError."""
        of_a_disk = {name: value for name, value in self._given.items() if name in _OF_A_DISK}
        disks: tuple[DiskOptions, ...] = (DiskOptions(**of_a_disk),) if "disk" in of_a_disk else ()
        settings = self._said
        if self._path is not None:
            self._config = read_config(self._path)
            disks = self._config.disks(of_a_disk) or disks
            settings = {**self._said, "log_level": _LOG_LEVEL, **self._config.settings(self._given)}
        if not disks:
            raise UsageError(
                "no disk to serve: give a DISK (a file, a block device or an NBD URI), or list [[export]]s in --config"
            )
        return self._options(settings, disks)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Let a UsageError about what the file says name its line."""
        try:
            yield
        except UsageError as error:
            raise error if self._config is None else self._config.blame(error, self._given) from None

    def _options(self, settings: dict[str, Any], disks: tuple[DiskOptions, ...]) -> ServeOptions:
        vsock, tls = settings["vsock"], settings["tls"]
        return ServeOptions(
            disks=disks,
            socket_path=settings["socket"],
            port=settings["port"],
            bind=settings["bind"],
            vsock=parse_vsock(vsock) if isinstance(vsock, str) else vsock,
            activated=self._activated,
            insecure=settings["insecure"],
            max_clients=settings["shared"],
            qmp_paths=settings["qmp"],
            run=settings["run"],
            ready_fd=settings["ready_fd"],
            pid_file=settings["pid_file"],
            tls=None if tls is None else TlsMode(tls),
            tls_certificates=settings["tls_certificates"],
            tls_verify_peer=settings["tls_verify_peer"],
            tls_psk=settings["tls_psk"],
            allow_ip=settings["allow_ip"],
            allow_dn=settings["allow_dn"],
            state=settings["state"],
            resume=Resume(settings["resume"]),
            metrics=settings["metrics"],
            log_level=None if self._logs_as_told else settings.get("log_level"),
        )


COMMANDS: Final = (serve,)
