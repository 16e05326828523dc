"""Other people's QMP clients, the library `qemu.qmp` and its qmp-shell, with every command that there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from nbdmirror.units import MiB
from tests.support.bad_arguments import Schema
from tests.support.control import Control
from tests.support.daemon import Daemon, serving
from tests.support.tools import TOOL_SECONDS, make_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

# These end the conversation, or are over when it begins.
BEYOND = {"qmp_capabilities", "quit"}
PROMPTS = ("(QEMU) ", "TRANS> ")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with serving(make_disk(tmp_path / "disk", MiB), qmp=True) as daemon, Control(daemon.control) as qmp:
        qmp.bitmap("add", "b")
        yield daemon


def commands(qmp: Control) -> list[tuple[str, dict[str, Any]]]:
    """Every command, with arguments that are well formed and change nothing."""
    schema = Schema(qmp.ask("query-qmp-schema"))
    found = {command: schema.least(command) for command in schema.commands if command not in BEYOND}
    found["nbd-server-start"]["addr"] = {"type": "unix", "data": {"path": "/no/such/socket"}}
    assert len(found) > 30
    return list(found.items())


def shell(daemon: Daemon, lines: list[str]) -> list[dict[str, Any]]:
    """What qmp-shell prints of the answers to some lines."""
    program = Path(sys.executable).with_name("qmp-shell")
    script = "".join(f"{line}\n" for line in lines)
    result = subprocess.run(
        [program, daemon.control], input=script, capture_output=True, text=True, timeout=TOOL_SECONDS, check=True
    )
    answers = []
    for line in result.stdout.splitlines():
        for prompt in PROMPTS:
            line = line.replace(prompt, "")
        if line.startswith("{"):
            answers.append(json.loads(line))
    return answers


def as_line(command: str, arguments: dict[str, Any]) -> str:
    """In qmp-shell's language, where a word has no blanks."""
    words = {
        key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":")) for key, value in arguments.items()
    }
    return " ".join([command, *(f"{key}={word}" for key, word in words.items())])


def test_qmp_shell_says_everything(daemon: Daemon) -> None:
    with Control(daemon.control) as qmp:
        every = commands(qmp)
        answers = shell(daemon, [as_line(*each) for each in every])
        assert len(answers) == len(every)
        for (command, arguments), answer in zip(every, answers, strict=True):
            plain = qmp.tell(command, arguments)
            if plain.error is None:
                assert answer == {"return": plain.value}
            else:
                assert answer == {"error": {"class": plain.error[0], "desc": plain.error[1]}}


def test_qmp_shell_makes_transactions(daemon: Daemon) -> None:
    answers = shell(
        daemon,
        [
            "transaction(",
            "block-dirty-bitmap-add node=source name=c granularity=4096",
            "block-dirty-bitmap-merge node=source target=c bitmaps=['b']",
            "block-dirty-bitmap-remove node=source name=b",
            ")",
        ],
    )
    assert answers == [{"return": {}}]
    with Control(daemon.control) as qmp:
        assert {name: info["granularity"] for name, info in qmp.bitmaps().items()} == {"c": 4096}


async def test_the_library_says_everything(daemon: Daemon) -> None:
    with Control(daemon.control) as qmp:
        client = QMPClient("test")
        await client.connect(str(daemon.control))
        for command, arguments in commands(qmp):
            plain = qmp.tell(command, arguments)
            if plain.error is None:
                assert await client.execute(command, arguments or None) == plain.value
            else:
                with pytest.raises(ExecuteError) as caught:
                    await client.execute(command, arguments or None)
                assert (caught.value.error_class, str(caught.value)) == plain.error
        await client.disconnect()
