"""Every command with everything wrong that its schema lets one get wrong: the error that names it, and nothing changed."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from nbdmirror.units import MiB
from tests.support.bad_arguments import Schema
from tests.support.control import Control, unix
from tests.support.daemon import serving
from tests.support.tools import make_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUERIES = (
    "query-named-block-nodes",
    "query-block-exports",
    "query-jobs",
    "query-block-jobs",
    "x-nbdmirror-query-job-history",
    "x-nbdmirror-query-nbd-server",
)


@pytest.fixture
def busy(tmp_path: Path, sock_dir: Path) -> Iterator[Control]:
    """A daemon with some of everything: disks, bitmaps, a server with an export, credentials, and a job that is ready."""
    keys = tmp_path / "psk"
    keys.mkdir()
    (keys / "keys.psk").write_text("qemu:0123456789abcdef\n")
    with serving(make_disk(tmp_path / "disk", MiB), qmp=True) as daemon, Control(daemon.control) as qmp:
        for name in ("target", "other"):
            qmp.ask("blockdev-add", driver="file", node_name=name, filename=str(make_disk(tmp_path / name, MiB)))
            qmp.bitmap("add", "b", node=name)
        qmp.bitmap("add", "b")
        qmp.ask("nbd-server-start", addr=unix(sock_dir / "n"))
        qmp.ask("block-export-add", type="nbd", id="e", node_name="other", writable=True, bitmaps=["b"])
        qmp.ask("object-add", qom_type="tls-creds-psk", id="t", dir=str(keys))
        qmp.ask("blockdev-mirror", job_id="j", device="source", target="target", sync="none")
        qmp.wait("BLOCK_JOB_READY")
        yield qmp


def state(qmp: Control) -> list[Any]:
    return [qmp.ask(query) for query in QUERIES]


def test_wrong_arguments_are_named_and_change_nothing(busy: Control) -> None:
    schema = Schema(busy.ask("query-qmp-schema"))
    before = state(busy)
    wrong, tried = [], 0
    for command in schema.commands:
        if command == "qmp_capabilities":
            continue  # it is over, whatever its arguments
        for arguments, pattern in schema.bad_arguments(command):
            tried += 1
            answer = busy.tell(command, arguments)
            desc = answer.error[1] if answer.error else "taken"
            if not re.fullmatch(pattern, desc) or answer.events:
                wrong.append(f"{command} {json.dumps(arguments)}: {desc} {answer.events}, not {pattern}")
        assert state(busy) == before, command
    assert not wrong, "\n".join(wrong)
    assert tried > 1000


def test_names_of_nothing_change_nothing(busy: Control) -> None:
    """Well-formed arguments that no node, bitmap, export, job or object answers to."""
    schema = Schema(busy.ask("query-qmp-schema"))
    before = state(busy)
    for command in schema.commands:
        if command in {"qmp_capabilities", "quit", "nbd-server-stop"}:
            continue
        arguments = schema.least(command)
        answer = busy.tell(command, arguments)
        if arguments and command != "transaction":
            assert answer.error is not None, f"{command} {arguments} was taken"
            assert not answer.error[1].startswith(("Parameter", "Invalid parameter type")), (command, arguments, answer)
        assert state(busy) == before, command


def test_member_that_is_given_twice(busy: Control) -> None:
    for command in Schema(busy.ask("query-qmp-schema")).commands:
        line = f'{{"execute": "{command}", "arguments": {{"zork": 1, "zork": 2}}}}'
        assert busy.say(line) == ("GenericError", "JSON parse error, duplicate key")


def test_schema_names_what_it_describes(busy: Control) -> None:
    entries = busy.ask("query-qmp-schema")
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)
    commands = {entry["name"] for entry in entries if entry["meta-type"] == "command"}
    assert commands == {entry["name"] for entry in busy.ask("query-commands")}
    used: set[str] = set()
    for entry in entries:
        used |= {entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry}
        used |= {each["type"] for key in ("members", "variants") for each in entry.get(key, ()) if "type" in each}
    assert used <= set(names)
    events = {entry["name"] for entry in entries if entry["meta-type"] == "event"}
    assert {"BLOCK_EXPORT_DELETED", "BLOCK_JOB_READY", "JOB_STATUS_CHANGE", "SHUTDOWN"} <= events
