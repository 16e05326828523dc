"""The same script against qemu-storage-daemon and against us: the same answers, errors and events, but for what is listed."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import nbd
import pytest

from nbdmirror.units import MiB
from tests.integration.qemu_steps import GENERIC, SCRIPT, Step
from tests.support.bad_arguments import Schema
from tests.support.certificates import Authority
from tests.support.control import Answer, Control, unix
from tests.support.daemon import serving
from tests.support.peers import require
from tests.support.tools import make_disk, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What is ours in the answers of queries throughout, with the reason.
OWN_MEMBERS: Final = "x-"  # members that QEMU does not have are marked as such
OWN_NODE: Final = "source"  # a daemon serves a disk from its start
OWN_EXPORT: Final = "default"


@contextmanager
def storage_daemon(path: Path) -> Iterator[Control]:
    require("qemu-storage-daemon")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # It inherits a socket that listens already, so that there is nothing to wait for.
        chardev = f"socket,fd={listener.fileno()},server=on,wait=off,id=c"
        command = ["qemu-storage-daemon", "--chardev", chardev, "--monitor", "chardev=c"]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    try:
        with Control(path) as control:
            yield control
    finally:
        process.terminate()
        process.wait(20)


def prepare(directory: Path, authority: Authority) -> Path:
    directory.mkdir()
    for name, size in (("a.img", 64 * MiB), ("b.img", 32 * MiB), ("c.img", 64 * MiB)):
        make_disk(directory / name, size)
    for name in ("psk", "empty"):
        (directory / name).mkdir()
    (directory / "psk" / "keys.psk").write_text("qemu:0123456789abcdef0123456789abcdef\n")
    authority.server(directory / "pki")
    return directory


def put_in(value: Any, directory: str) -> Any:
    """With a directory for `{dir}`."""
    match value:
        case str():
            return value.replace("{dir}", directory)
        case list():
            return [put_in(each, directory) for each in value]
        case dict():
            return {key: put_in(each, directory) for key, each in value.items()}
    return value


def take_out(value: Any, directory: str) -> Any:
    """With `{dir}` for a directory, and nothing that is always ours."""
    match value:
        case str():
            return value.replace(directory, "{dir}")
        case tuple():
            return tuple(take_out(each, directory) for each in value)
        case list():
            return [take_out(each, directory) for each in value if not is_ours(each)]
        case dict():
            return {key: take_out(each, directory) for key, each in value.items() if not key.startswith(OWN_MEMBERS)}
    return value


def is_ours(entry: Any) -> bool:
    return isinstance(entry, dict) and (entry.get("id") == OWN_EXPORT or entry.get("node-name") == OWN_NODE)


def run_step(control: Control, step: Step, directory: Path) -> Answer:
    answer = control.tell(step.command, put_in(step.arguments, str(directory)))
    while step.until is not None and not any(
        name == step.until[0] and step.until[1] in (None, data) for name, data in answer.events
    ):
        answer.events += control.tell("query-version", {}).events
    for part in ("value", "error", "events"):
        setattr(answer, part, take_out(getattr(answer, part), str(directory)))
    return answer


def test_same_script_same_answers(tmp_path: Path, sock_dir: Path) -> None:
    authority = Authority(tmp_path / "ca")
    theirs_dir, ours_dir = (prepare(sock_dir / name, authority) for name in ("q", "n"))
    served = make_disk(tmp_path / "served.img", MiB)
    wrong: list[str] = []
    with storage_daemon(sock_dir / "s") as theirs, serving(served, qmp=True) as daemon, Control(daemon.control) as ours:
        for step in SCRIPT:
            qemu = run_step(theirs, step, theirs_dir)
            mine = run_step(ours, step, ours_dir)
            wrong += [f"{step.command} {str(step.arguments)[:300]}\n  {each}" for each in differences(step, qemu, mine)]
    assert not wrong, "\n".join(wrong)


def differences(step: Step, qemu: Answer, mine: Answer) -> Iterator[str]:
    """What is not as it should be."""
    differs = step.differs
    if differs is None:
        if qemu != mine:
            yield f"QEMU: {shown(qemu)}\n  ours: {shown(mine)}"
        return
    error = None if differs.error is None else (GENERIC, differs.error)
    expected = Answer(None if error else differs.value, error, list(differs.events))
    if mine != expected:
        yield f"listed: {shown(expected)}\n  ours: {shown(mine)}"
    if qemu == mine:
        yield f"listed as different ({differs.reason}), and the same: {shown(mine)}"


def shown(answer: Answer) -> str:
    return str(answer.error or answer.value)[:2000] + (f" {answer.events}" if answer.events else "")


WRITES: Final = ("write 0 1", "write 1000k 200k", "write -z 5M 4M", "discard 20M 1M", f"write {64 * MiB - 512} 512")
GRANULARITIES: Final = (512, 4096, 65536, 2**20, 2**31)


def bitmaps_after_writes(control: Control, directory: Path) -> list[Any]:
    """Hashes, counts and maps of bitmaps of all granularities after some writes, and the fates of clients."""
    found: list[Any] = []
    control.ask("blockdev-add", driver="file", filename=str(directory / "a.img"), node_name="src", discard="unmap")
    for granularity in GRANULARITIES:
        control.bitmap("add", f"g{granularity}", node="src", granularity=granularity)
    control.ask("nbd-server-start", addr=unix(directory / "n"))
    names = [f"g{granularity}" for granularity in GRANULARITIES]
    control.ask("block-export-add", type="nbd", id="e", node_name="src", writable=True, bitmaps=names)
    uri = f"nbd+unix:///src?socket={directory / 'n'}"
    run("qemu-io", "-f", "raw", "-d", "unmap", *(word for each in WRITES for word in ("-c", each)), uri)
    for name in names:
        found.append(control.ask("x-debug-block-dirty-bitmap-sha256", node="src", name=name))
        found.append(control.bitmaps("src")[name])
        found.append(merged(json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri))))
    client = nbd.NBD()
    client.connect_uri(uri)
    found += [control.tell("block-export-del", {"id": "e", **mode}) for mode in ({}, {"mode": "safe"}, {"mode": "hard"})]
    with pytest.raises(nbd.Error):
        client.pread(512, 0)
    control.bitmap("add", "sum", node="src", granularity=1024, disabled=True)
    control.ask("block-dirty-bitmap-merge", node="src", target="sum", bitmaps=["g512", "g4096"])
    found.append(control.ask("x-debug-block-dirty-bitmap-sha256", node="src", name="sum"))
    control.ask("block-dirty-bitmap-merge", node="src", target="sum", bitmaps=names)
    found.append(control.ask("x-debug-block-dirty-bitmap-sha256", node="src", name="sum"))
    return found


def merged(entries: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Extents by (offset, length, flags), neighbours with the same flags as one: servers may cut them anywhere."""
    extents: list[tuple[int, int, int]] = []
    for entry in entries:
        if extents and extents[-1][2] == entry["type"]:
            offset, length, flags = extents.pop()
            extents.append((offset, length + entry["length"], flags))
        else:
            extents.append((entry["offset"], entry["length"], entry["type"]))
    return extents


def test_same_writes_same_bitmaps(tmp_path: Path, sock_dir: Path) -> None:
    require("qemu-io", "nbdinfo")
    authority = Authority(tmp_path / "ca")
    theirs_dir, ours_dir = (prepare(sock_dir / name, authority) for name in ("q", "n"))
    served = make_disk(tmp_path / "served.img", MiB)
    with storage_daemon(sock_dir / "s") as theirs, serving(served, qmp=True) as daemon, Control(daemon.control) as ours:
        assert bitmaps_after_writes(ours, ours_dir) == bitmaps_after_writes(theirs, theirs_dir)


# Where wrong arguments are answered in other words: patterns of the command and of QEMU's answer, and the reason.
WORDS: Final = (
    (".*", "Parameter '.*' is unexpected", "a member that QEMU 7.2 does not have yet, or that is ours"),
    ("drive-mirror", "Cannot find device='zz'.*", "of drive-mirror there is what scripts use: existing targets, raw or NBD"),
)
# QEMU takes names and paths with a NUL, cut there, and 7.2 crashes while taking back an action on a bitmap that there is not.
NUL: Final = "\\u0000"


def test_wrong_arguments_same_words(tmp_path: Path, sock_dir: Path) -> None:
    served = make_disk(tmp_path / "served.img", MiB)
    unlisted, reasons = [], set()
    with storage_daemon(sock_dir / "s") as theirs, serving(served, qmp=True) as daemon, Control(daemon.control) as ours:
        schema = Schema(ours.ask("query-qmp-schema"))
        known = {command["name"] for command in theirs.ask("query-commands")} - {"qmp_capabilities"}
        for command in known.intersection(schema.commands):
            for arguments, _ in schema.bad_arguments(command):
                case = f"{command} {json.dumps(arguments)}"
                if NUL in case:
                    continue
                mine, qemu = ours.tell(command, arguments).error, theirs.tell(command, arguments).error
                if mine == qemu:
                    continue
                assert qemu is not None, case
                words = f"{command}\n{qemu[1]}"
                reason = next((why for name, said, why in WORDS if re.fullmatch(f"{name}\n{said}", words)), None)
                if reason is None:
                    unlisted.append(f"{case}\n  QEMU: {qemu}\n  ours: {mine}")
                reasons.add(reason)
    assert not unlisted, "\n".join(unlisted)
    assert reasons == {why for *_, why in WORDS}


def test_listed_members_of_ours_are_there(tmp_path: Path) -> None:
    """What the comparison leaves out is really told."""
    with serving(make_disk(tmp_path / "served.img", MiB), qmp=True) as daemon, Control(daemon.control) as ours:
        (export,) = ours.ask("query-block-exports")
        assert export["id"] == OWN_EXPORT
        assert any(key.startswith(OWN_MEMBERS) for key in export)
        assert [node["node-name"] for node in ours.ask("query-named-block-nodes")] == [OWN_NODE]


@pytest.mark.parametrize("step", [step for step in SCRIPT if step.differs is not None], ids=lambda step: step.command)
def test_every_difference_has_a_reason(step: Step) -> None:
    assert step.differs is not None
    assert len(step.differs.reason) > 10
