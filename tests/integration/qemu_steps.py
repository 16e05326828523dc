"""A script for two control sockets, qemu-storage-daemon's and ours, and where the answers differ, each with the reason.

`{dir}` is a directory with the disks a.img and c.img of 64 MiB, b.img of 32 MiB, and credentials in pki, psk and empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

GENERIC: Final = "GenericError"


@dataclass(frozen=True, slots=True)
class Differs:
    """A step that we answer in another way: `error` is our text, None a success; `value` and `events` are ours, too."""

    reason: str
    error: str | None = None
    value: Any = field(default_factory=dict)
    events: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A command. `until` is an event that has to have come before the next one."""

    command: str
    arguments: dict[str, Any]
    differs: Differs | None = None
    until: tuple[str, Any] | None = None


def do(command: str, differs: Differs | None = None, until: tuple[str, Any] | None = None, /, **arguments: Any) -> Step:
    """A step; names have underscores for dashes."""
    return Step(command, {name.replace("_", "-"): value for name, value in arguments.items()}, differs, until)


def unix(name: str) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": f"{{dir}}/{name}"}}


def inet(host: str, port: str) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": host, "port": port}}


def action(verb: str, name: str = "b0", node: str = "src", **more: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name, **more}}


def transact(*actions: Any, differs: Differs | None = None, **more: Any) -> Step:
    return Step("transaction", {"actions": list(actions), **more}, differs)


ABORT: Final = {"type": "abort", "data": {}}
LONG: Final = "x" * 1024

AT_ONCE = "remove takes effect at once in a transaction, so that a bitmap can be replaced by one of its name"
NO_THREADS = "there is one thread, and so none to choose"
NO_FD = "sockets are made by the daemon, not given to it"
RAW_SIDE = "raw disks have persistent bitmaps here, in a state directory"

NODES: Final = (
    do("query-block"),
    do("query-named-block-nodes"),
    do("blockdev-add", driver="file", filename="{dir}/a.img", node_name="src"),
    do("blockdev-add", driver="file", filename="{dir}/b.img", node_name="ro", read_only=True),
    do("blockdev-add", driver="file", filename="{dir}/c.img", node_name="dst"),
    do("blockdev-add", driver="file", filename="{dir}/a.img"),
    do("blockdev-add", driver="file", filename="{dir}/a.img", node_name="src"),
    do("blockdev-add", driver="file", filename="{dir}/a.img", node_name="1bad"),
    do("blockdev-add", driver="file", filename="{dir}/a.img", node_name=""),
    do("blockdev-add", driver="file", filename="{dir}/a.img", node_name="x" * 32),
    do("blockdev-add", driver="file", filename="{dir}/nonexist", node_name="f"),
    do("blockdev-add", driver="file", filename="{dir}/empty", node_name="f"),
    do("blockdev-add", driver="host_device", filename="{dir}/a.img", node_name="f"),
    do("blockdev-add", driver="host_device", filename="{dir}/nonexist", node_name="f"),
    do("blockdev-add", driver="nbd", server={"type": "unix", "path": "{dir}/nosock"}, node_name="f"),
    do("blockdev-add", driver="nbd", server={"type": "inet", "host": "127.0.0.1", "port": "1"}, node_name="f"),
    do("blockdev-add", driver="nbd", server={"type": "inet", "host": "127.0.0.1", "port": "x"}, node_name="f"),
    do("blockdev-add", driver="nbd", node_name="f"),
    do("blockdev-add", driver="raw", file="nope", node_name="f"),
    do("blockdev-add", driver="raw", file={"driver": "file", "filename": "{dir}/nonexist"}, node_name="f"),
    do("blockdev-add", driver="zork", node_name="f"),
    do("blockdev-add", node_name="f"),
    do("blockdev-add", driver="raw", file="dst", node_name="over"),
    do("blockdev-del", node_name="dst"),
    do("blockdev-del", node_name="over"),
    do("blockdev-del", node_name="zzz"),
    do("query-named-block-nodes", flat=True),
)

BITMAPS: Final = (
    do("block-dirty-bitmap-add", node="src", name="b0"),
    do("block-dirty-bitmap-add", node="src", name="b1", disabled=True),
    do("block-dirty-bitmap-add", node="src", name="big", granularity=2**31),
    do("block-dirty-bitmap-add", node="ro", name="b0"),
    do("block-dirty-bitmap-add", node="zz", name="b0"),
    do("block-dirty-bitmap-add", node="src", name="b0"),
    do("block-dirty-bitmap-add", node="src", name=""),
    do("block-dirty-bitmap-add", node="src", name="", granularity=3),
    do("block-dirty-bitmap-add", node="src", name="x", granularity=3),
    do("block-dirty-bitmap-add", node="src", name="x", granularity=0),
    do("block-dirty-bitmap-add", node="src", name="x", granularity=256),
    do("block-dirty-bitmap-add", node="src", name="x", granularity=-1),
    do("block-dirty-bitmap-add", node="src", name="x", granularity=2**32),
    do("block-dirty-bitmap-add", node="src", name="b0", granularity=3),
    do("block-dirty-bitmap-add", node="src", name=LONG),
    do("block-dirty-bitmap-add", node="src", name="x" * 1023),
    do("block-dirty-bitmap-remove", node="src", name="x" * 1023),
    do("block-dirty-bitmap-add", node="src", name=LONG, granularity=3),
    do(
        "block-dirty-bitmap-add",
        Differs(
            RAW_SIDE,
            "Can't store persistent bitmaps to src: the daemon has no state directory; start it with --state-dir",
        ),
        node="src",
        name="b0",
        persistent=True,
    ),
    *(
        do(f"block-dirty-bitmap-{verb}", **where)
        for verb in ("remove", "clear", "enable", "disable")
        for where in ({"node": "zz", "name": "b0"}, {"node": "src", "name": "zz"}, {"node": "src"}, {"name": "b0"})
    ),
    do("block-dirty-bitmap-clear", node="src", name="b0"),
    do("block-dirty-bitmap-disable", node="src", name="b0"),
    do("block-dirty-bitmap-disable", node="src", name="b0"),
    do("block-dirty-bitmap-enable", node="src", name="b0"),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps=["b1", "b0", {"node": "src", "name": "big"}]),
    do("block-dirty-bitmap-merge", node="src", target="zz", bitmaps=["b0"]),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps=["b1", "zz"]),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps=[{"node": "zz", "name": "b0"}]),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps=[{"node": "ro", "name": "b0"}]),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps=[1]),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps=[{"node": "src"}]),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps="b1"),
    do("x-debug-block-dirty-bitmap-sha256", node="src", name="b0"),
    do("x-debug-block-dirty-bitmap-sha256", node="src", name="big"),
    do("x-debug-block-dirty-bitmap-sha256", node="src", name="zz"),
    do("x-debug-block-dirty-bitmap-sha256", node="zz", name="b0"),
    do("query-named-block-nodes"),
)

TRANSACTIONS: Final = (
    transact(),
    transact(ABORT),
    transact(action("add", "t"), ABORT),
    transact(action("add", "t"), action("add", "t")),
    transact(action("add", "t"), action("clear"), action("disable"), action("remove", "b1"), ABORT),
    transact(action("clear", "zz")),
    transact(action("add", "t", granularity=3)),
    transact(action("add", "t"), action("enable", "b1"), {"type": "block-dirty-bitmap-merge", "data": {"node": "src"}}),
    transact(action("add", "t", disabled=True), action("enable", "t"), action("disable", "b0"), action("remove", "b1")),
    transact(
        action("remove", "t"),
        action("clear", "t"),
        differs=Differs(AT_ONCE, "Dirty bitmap 't' not found"),
    ),
    transact(action("remove", "t"), action("add", "t"), differs=Differs(AT_ONCE)),
    transact({"type": "blockdev-mirror", "data": {}}),
    transact({"type": "abort"}),
    transact({"data": {}}),
    transact({"type": "abort", "data": {"x": 1}}),
    transact({"type": "abort", "data": {}, "x": 1}),
    transact({"type": "block-dirty-bitmap-clear", "data": {"node": "src"}}),
    transact(ABORT, properties={"completion-mode": "x"}),
    transact(ABORT, properties={"x": 1}),
    transact(ABORT, properties={"completion-mode": "grouped"}),
    transact(action("clear"), properties={"completion-mode": "grouped"}),
    transact(action("add", "g"), properties={"completion-mode": "grouped"}),
    transact(action("add", "i"), action("remove", "i"), properties={"completion-mode": "individual"}),
    do("transaction"),
    do("query-named-block-nodes"),
)

EXPORTS: Final = (
    do("block-dirty-bitmap-add", node="src", name="off", disabled=True),
    do("block-export-add", type="nbd", id="e0", node_name="src"),
    do("nbd-server-add", device="src"),
    do("nbd-server-stop"),
    do("nbd-server-start", addr=unix("no/such")),
    do("nbd-server-start", addr=inet("127.0.0.1", "x")),
    do("nbd-server-start", addr={"type": "unix", "path": "x"}),
    do("nbd-server-start", addr=unix("n"), tls_creds="t0"),
    do("nbd-server-start", addr=unix("n"), max_connections=-1),
    do("nbd-server-start"),
    do(
        "nbd-server-start",
        Differs(NO_FD, "Parameter 'type' does not accept value 'fd'"),
        addr={"type": "fd", "data": {"str": "zz"}},
    ),
    do("nbd-server-start", addr=unix("n")),
    do("nbd-server-start", addr=unix("m")),
    do("block-export-add", type="nbd", id="0e", node_name="nope", writable=True),
    do("block-export-add", type="nbd", id="", node_name="nope"),
    do("block-export-add", type="nbd", id="e0", node_name="nope", writable=True),
    do("block-export-add", type="nbd", id="e0", node_name="ro", writable=True),
    do("block-export-add", type="foo", id="e0", node_name="src"),
    do("block-export-add", type="nbd", node_name="src"),
    do("block-export-add", type="nbd", id="e0", node_name="src", name="x", writable=True, bitmaps=["b0", "off"]),
    do("query-block-exports"),
    do("query-named-block-nodes"),
    *(do(f"block-dirty-bitmap-{verb}", node="src", name="b0") for verb in ("remove", "clear", "enable", "disable")),
    do("block-dirty-bitmap-add", node="src", name="free"),
    do("block-dirty-bitmap-merge", node="src", target="b0", bitmaps=["free"]),
    do("block-dirty-bitmap-merge", node="src", target="free", bitmaps=["b0"]),
    do("x-debug-block-dirty-bitmap-sha256", node="src", name="b0"),
    do("block-export-add", type="nbd", id="e0", node_name="src", name="y"),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="x"),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="y" * 4097),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="x", description="d" * 4097),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="y", bitmaps=["zz"]),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="y", bitmaps=["free"]),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="y", bitmaps=[{"node": "zz", "name": "b"}]),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="y", bitmaps=[1]),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="y", bitmaps=["off"]),
    do("block-export-add", type="nbd", id="e1", node_name="src", name="y", x=1),
    do("block-export-add", type="nbd", id="e1", node_name="ro", name="y", bitmaps=["b0"], writethrough=True),
    do("block-export-add", type="nbd", id="e2", node_name="src", allocation_depth=True, description="all"),
    do(
        "block-export-add",
        Differs(NO_THREADS, "Parameter 'fixed-iothread' is unexpected"),
        type="nbd",
        id="e3",
        node_name="src",
        name="z",
        fixed_iothread=True,
    ),
    do("nbd-server-add", device="src", name="legacy", writable=True, bitmap="free", description="d"),
    do("nbd-server-add", device="src", name="legacy"),
    do("nbd-server-add", device="src", name="0leg acy"),
    do("nbd-server-add", device="nope"),
    do("nbd-server-add", device="src", name="l2", bitmap="zz"),
    do("nbd-server-add", device="ro", name="l3", writable=True),
    do("nbd-server-remove", name="nope"),
    do("nbd-server-remove", name="legacy"),
    do("block-export-del", id="zz"),
    do("block-export-del", id="e1", mode="foo"),
    do("block-export-del", id="e1", mode="hard"),
    do("block-export-del", id="e1"),
    do("blockdev-del", node_name="src"),
    do(
        "nbd-server-stop",
        Differs(
            "we tell of the newest first, with clients or without; QEMU 7.2 of the oldest where there are none",
            events=tuple(("BLOCK_EXPORT_DELETED", {"id": name}) for name in ("l3", "e2", "e0")),
        ),
    ),
    do("nbd-server-stop"),
    do("query-block-exports"),
    do("query-named-block-nodes"),
)

OBJECTS: Final = (
    do("object-add", qom_type="nope", id="t0"),
    do("object-add", qom_type="tls-creds-x509"),
    do("object-add", id="t0"),
    do("object-add", qom_type="tls-creds-x509", id="0t", dir="{dir}/pki"),
    do("object-add", qom_type="tls-creds-x509", id="t0", endpoint="server"),
    do("object-add", qom_type="tls-creds-x509", id="t0", dir="{dir}/empty", endpoint="server"),
    do("object-add", qom_type="tls-creds-x509", id="t0", dir="{dir}/empty", endpoint="x"),
    do("object-add", qom_type="tls-creds-psk", id="t0", dir="{dir}/empty"),
    do("object-add", qom_type="tls-creds-psk", id="t0", dir="{dir}/psk", username="nobody"),
    do("object-add", qom_type="tls-creds-psk", id="t0", dir="{dir}/psk", foo=1),
    do("object-add", qom_type="tls-creds-psk", id="p0", dir="{dir}/psk"),
    do("object-add", qom_type="tls-creds-x509", id="t0", dir="{dir}/pki", endpoint="server", verify_peer=True),
    do("object-add", qom_type="tls-creds-x509", id="t0", dir="{dir}/pki", endpoint="server"),
    do("nbd-server-start", addr=unix("n"), tls_creds="zz"),
    do("nbd-server-start", addr=unix("n"), tls_creds="p0"),
    do("nbd-server-start", addr=unix("n"), tls_creds="t0"),
    do("nbd-server-stop"),
    do("object-del", id="t0"),
    do("object-del", id="p0"),
    do("object-del", id="t0"),
    do("object-del"),
)

JOBS: Final = (
    do("query-jobs"),
    do("query-block-jobs"),
    *(do(f"block-job-{verb}", device="x") for verb in ("pause", "resume", "complete", "cancel", "finalize")),
    *(do(f"block-job-{verb}", id="x") for verb in ("pause", "finalize", "dismiss")),
    *(do(f"job-{verb}", id="x") for verb in ("pause", "resume", "complete", "cancel", "finalize", "dismiss")),
    do("block-job-set-speed", device="x", speed=0),
    do("nbd-server-start", addr=unix("n")),
    do("block-export-add", type="nbd", id="e0", node_name="src", writable=True),
    do("blockdev-mirror", None, ("BLOCK_JOB_READY", None), job_id="j", device="src", target="dst", sync="none"),
    do("block-export-add", type="nbd", id="e1", node_name="dst", writable=True),
    do("block-export-add", type="nbd", id="e1", node_name="dst"),
    do("blockdev-del", node_name="dst"),
    do("job-complete", None, ("JOB_STATUS_CHANGE", {"id": "j", "status": "null"}), id="j"),
    do("query-block-exports"),
    do("query-jobs"),
    do("nbd-server-stop"),
    do("blockdev-del", node_name="src"),
    do("blockdev-del", node_name="dst"),
    do("blockdev-del", node_name="ro"),
    do("query-named-block-nodes"),
)

SCRIPT: Final = (*NODES, *BITMAPS, *TRANSACTIONS, *EXPORTS, *OBJECTS, *JOBS)
