"""The plugins as scripts of nbdkit's: their parameters, their control sockets, and that they need nothing of the product."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from nbdmirror.units import MiB
from tests.support import plugins
from tests.support.daemon import run_cli, until
from tests.support.mirroring import refused
from tests.support.tools import completed, content, fails, make_disk, pattern, run

if TYPE_CHECKING:
    from pathlib import Path

FAULT, VERIFY, CONTROL = (plugins.PLUGINS / name for name in ("fault.py", "verify.py", "control.py"))


@pytest.fixture(autouse=True)
def _nbdkit() -> None:
    plugins.require()


@pytest.mark.parametrize(
    ("script", "parameters", "words"),
    [
        ("fault", [], "give either file=PATH or size=SIZE"),
        ("fault", ["size=1M", "file=/tmp/none"], "give either file=PATH or size=SIZE"),
        ("fault", ["file=none"], "none: No such file or directory"),
        ("fault", ["size=1x"], "'1x' is no size: give one like 512, 64k or 1G"),
        ("fault", ["size=1M", "colour=red"], "no such parameter: colour"),
        ("fault", ["size=1M", "seed=red"], "seed=red: give a number"),
        ("fault", ["size=1M", "volatile=2"], "'2' is no probability"),
        ("fault", ["size=1M", "volatile=often"], "'often' is no probability"),
        ("fault", ["size=1M", "block-size=512"], "block-size: give MINIMUM:PREFERRED:MAXIMUM"),
        ("fault", ["size=1M", "without=zero"], "without=zero: it can be without cache, extents,"),
        ("fault", ["size=1M", "control=/none/control"], "control=/none/control: No such file or directory"),
        ("fault", ["size=1M", "fault="], "fault=: needs one action of error,"),
        ("fault", ["size=1M", "fault=write"], "fault=write: needs one action"),
        ("fault", ["size=1M", "fault=write hang lie"], "needs one action"),
        ("fault", ["size=1M", "fault=write hang at=1 at=2"], "each option once"),
        ("fault", ["size=1M", "fault=wrote hang"], "there is no hang of wrote, only of cache, connect,"),
        ("fault", ["size=1M", "fault=any lie"], "there is no lie of cache, connect,"),
        ("fault", ["size=1M", "fault=write hang=1"], "hang takes no value"),
        ("fault", ["size=1M", "fault=write error=EVIL"], "'EVIL' is no error's name, as EIO is"),
        ("fault", ["size=1M", "fault=write delay=soon"], "'soon' is no number"),
        ("fault", ["size=1M", "fault=write disconnect"], "disconnect is one of before, unanswered, answered"),
        ("fault", ["size=1M", "fault=write short"], "'' is no size"),
        ("fault", ["size=1M", "fault=write hang p=2"], "'2' is no probability"),
        ("fault", ["size=1M", "fault=write hang at=x"], "'x' is no number"),
        ("fault", ["size=1M", "fault=write hang from=x"], "'x' is no size"),
        ("fault", ["size=1M", "fault=write hang till=1"], "no such option: till; there are from, to, at, times and p"),
        ("verify", [], "give size=SIZE or reference=FILE"),
        ("verify", ["size=1M", "chunk=0"], "chunk=0: give a size"),
        ("verify", ["size=1M", "colour=red"], "no such parameter: colour"),
        ("verify", ["reference=none"], "none: No such file or directory"),
        ("verify", ["size=1M", "report=/none/report"], "/none/report.new: No such file or directory"),
        ("verify", ["size=1M", "control=/none/control"], "control=/none/control: No such file or directory"),
    ],
)
def test_a_wrong_parameter_is_one_line_that_says_what(
    script: str, parameters: list[str], words: str, tmp_path: Path, sock_dir: Path
) -> None:
    path = plugins.PLUGINS / f"{script}.py"
    said = fails("nbdkit", "-U", sock_dir / "s", "python", path, *parameters, cwd=tmp_path)
    assert said.startswith((f"nbdkit: error: {script}.py: ", "nbdkit: error: control="))
    assert words in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_they_run_where_there_is_nothing_else_and_explain_themselves(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(plugins.PLUGINS, alone, ignore=shutil.ignore_patterns("__pycache__"))
    disk = make_disk(tmp_path / "disk", MiB, {5000: pattern(5000)})
    bare = {"PATH": os.environ["PATH"]}
    for parameters in (["fault.py", "size=1M"], ["verify.py", f"reference={disk}"]):
        run("nbdkit", "-U", "-", "python", *parameters, "--run", f'nbdcopy "{disk}" "$uri"', cwd=alone, env=bare)
    for script in ("fault.py", "verify.py", "control.py"):
        said = fails(sys.executable, "-I", alone / script, cwd=tmp_path, env=bare)
        assert "Rules:" in said or "nbdkit python plugins/" in said
    assert "fault_actions=error,delay," in run("nbdkit", "python", "fault.py", "--dump-plugin", cwd=alone, env=bare)


def test_relative_paths_are_those_of_the_command_line(tmp_path: Path) -> None:
    """Nbdkit goes to / when it goes to the background, and so do the captive servers of a copy."""
    make_disk(tmp_path / "disk", MiB)
    source = make_disk(tmp_path / "source", MiB, {5000: pattern(5000)})
    pid_file, socket = tmp_path / "pid", tmp_path / "s"
    server = ["nbdkit", "-U", str(socket), "-P", str(pid_file), "python", str(FAULT), "file=disk", "control=control"]
    run(*server, cwd=tmp_path)
    until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"), "nbdkit writes its pid")
    pidfd = os.pidfd_open(int(pid_file.read_text()))
    try:
        run("nbdcopy", source, f"nbd+unix:///?socket={socket}")
        assert content(tmp_path / "disk", 0, MiB) == source.read_bytes()
        counts = json.loads(run(sys.executable, CONTROL, tmp_path / "control", "counts"))
        assert counts["requests"]["write"]["count"] >= 1
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        until(lambda: not (tmp_path / "control").exists(), "it has ended, and removed its control socket")
        os.close(pidfd)


def test_as_captive_servers_of_a_copy(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source", MiB, {5000: pattern(5000)})
    report = tmp_path / "report"
    verify = ["[", "nbdkit", "python", VERIFY, f"reference={source}", f"report={report}", "]"]
    assert run_cli("copy", source, *verify).returncode == 0
    told = json.loads(report.read_text())
    assert told["digest"] == run(sys.executable, VERIFY, source).strip()
    bad = ["[", "nbdkit", "python", FAULT, "size=1M", "fault=write error=ENOSPC", "]"]
    result = run_cli("copy", source, *bad)
    assert result.returncode == 1
    assert "No space left on device" in result.stderr.splitlines()[-1]


def test_the_control_socket_and_its_client(tmp_path: Path) -> None:
    with plugins.fault("size=1M") as target:
        assert target.control.stat().st_mode & 0o777 == 0o600
        run(sys.executable, CONTROL, target.control, "add", "write", "error=EIO", "at=2")
        assert target.ask("counts")["faults"][0]["fault"] == "write error=EIO at=2"
        for command, words in (
            ("nothing", "no such command: 'nothing'; there are: add, remove, clear, release, counts, resize, crash"),
            ("remove 7", "there is no rule '7'"),
            ("add write", "needs one action"),
        ):
            result = completed(sys.executable, CONTROL, target.control, *command.split())
            assert result.returncode == 1
            assert words in json.loads(result.stdout)["error"]
        said = fails("nbdkit", "-U", tmp_path / "s", "python", FAULT, "size=1M", f"control={target.control}")
        assert "Address already in use" in said
        assert fails(sys.executable, CONTROL, target.control, "crash").endswith("ended without an answer\n")
        assert target.peer.wait()
        assert "Connection refused" in fails(sys.executable, CONTROL, target.control, "counts")
        # What a killed one leaves behind is in nobody's way, and what was begun can be ended.
        again = ["nbdkit", "-U", "-", "python", FAULT, "size=1M", f"control={target.control}", "--run"]
        ask = f"{sys.executable} {CONTROL} {target.control} counts"
        assert json.loads(run(*again, ask))["size"] == MiB
        assert not target.control.exists()
    assert "No such file or directory" in fails(sys.executable, CONTROL, tmp_path / "none", "counts")


def test_a_target_that_fails_ends_a_copy_with_its_error(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source", MiB, {0: pattern(MiB)})
    with plugins.fault("size=1M", "fault=write error=ENOSPC from=512k") as target:
        refused(run_cli("copy", source, target.uri), 1, "No space left on device")
        assert target.hits() >= 1
        assert "No space left on device" in fails("nbdcopy", source, target.uri)
        target.ask("clear")
        assert subprocess.run(["nbdcopy", source, target.uri], check=True).returncode == 0
