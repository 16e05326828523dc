"""`nbdmirror serve`: export a disk and track its writes. qemu-nbd's short flags, nbdkit's names for TLS.

Rules:
1. A parameter has the name of its first long option, so that every option's environment variable can be guessed from it:
   NBDMIRROR_SERVE_EXPORT_NAME is --export-name.
2. The sockets of a service manager are taken, and a process is forked, before there is an event loop.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import click
import uvloop

from nbdmirror.cli.bitmap_options import state_options
from nbdmirror.cli.logs import log_options
from nbdmirror.cli.options import WORD
from nbdmirror.commands.saved_jobs import Resume
from nbdmirror.daemon import serve as run_daemon
from nbdmirror.errors import UsageError
from nbdmirror.launch import into_background, open_parent
from nbdmirror.protocol.constants import TlsMode
from nbdmirror.serving import ServeOptions
from nbdmirror.systemd import take_sockets

if TYPE_CHECKING:
    from nbdmirror.state import StateOptions

_MAX_U32: Final = 2**32 - 1


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
        # No port 0: the kernel's choice has ten digits, which libnbd does not take in a URI.
        *cid, port = (int(part) if part.isdecimal() and part.isascii() else 0 for part in value.split(":"))
        if len(cid) > 1 or not all(0 < number <= _MAX_U32 for number in (*cid, port)):
            self.fail(f"'{value}' is not [CID:]PORT, which are numbers from 1 on", param, ctx)
        return (cid[0] if cid else None), port


@click.command("serve", short_help="Export a disk and track its writes.")
@click.argument("disk")
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
@click.option("--node-name", default="source", show_default=True, help="The disk's name in the control language.")
@click.option("--qmp", type=WORD, multiple=True, metavar="PATH", help="A control socket (QMP); repeatable.")
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
def serve(
    *,
    disk: str,
    socket: str | None,
    port: int | None,
    bind: str | None,
    vsock: tuple[int | None, int] | None,
    insecure: bool,
    tls: str | None,
    tls_certificates: str | None,
    tls_verify_peer: bool,
    tls_psk: str | None,
    allow_ip: tuple[str, ...],
    allow_dn: tuple[str, ...],
    export_name: str,
    description: str,
    read_only: bool,
    shared: int,
    node_name: str,
    qmp: tuple[str, ...],
    run: str | None,
    fork: bool,
    exit_with_parent: bool,
    ready_fd: int | None,
    pid_file: str | None,
    state: StateOptions,
    resume: str,
) -> int:
    """Export DISK (a raw file, a block device or an NBD URI) and track its writes.

    Prints "READY URI" once it listens; SIGTERM and SIGINT stop it cleanly. Sockets that a service manager passes
    (LISTEN_FDS), named nbd or control, are used instead of those that -k, -p and --vsock would make.
    """
    activated = take_sockets(os.environ)
    parent_fd = open_parent() if exit_with_parent else None
    for is_set, why in (
        (run is not None, "--run ends with its command"),
        (exit_with_parent, "--exit-with-parent is for who stays"),
        (activated, "whoever passed a socket waits for this process"),
    ):
        if fork and is_set:
            raise UsageError(f"no --fork here: {why}")
    options = ServeOptions(
        disk=disk,
        socket_path=socket,
        port=port,
        bind=bind,
        vsock=vsock,
        activated=activated,
        insecure=insecure,
        export_name=export_name,
        description=description,
        read_only=read_only,
        max_clients=shared,
        node_name=node_name,
        qmp_paths=qmp,
        run=run,
        ready_fd=ready_fd,
        background_fd=into_background() if fork else None,
        parent_fd=parent_fd,
        pid_file=pid_file,
        tls=None if tls is None else TlsMode(tls),
        tls_certificates=tls_certificates,
        tls_verify_peer=tls_verify_peer,
        tls_psk=tls_psk,
        allow_ip=allow_ip,
        allow_dn=allow_dn,
        state=state,
        resume=Resume(resume),
    )
    return uvloop.run(run_daemon(options))


COMMANDS: Final = (serve,)
