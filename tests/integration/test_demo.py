"""`nbdmirror demo`: it shows what it claims, fails when a claim does not hold, and leaves nothing behind however it ends."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from nbdmirror.cli.demo_children import find_program
from nbdmirror.units import MiB
from tests.support.daemon import run_cli, until
from tests.support.peers import require

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL: Final = ("--size", "64M", "--seconds", "0.1")
MARK: Final = "NBDMIRROR_TEST_DEMO"


@pytest.fixture(autouse=True)
def _programs() -> None:
    for program in ("mkfs.ext4", "debugfs", "e2fsck"):
        if find_program(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture
def env(sock_dir: Path) -> Iterator[dict[str, str]]:
    """Scratch space of the demo's own, and a mark on its processes; nothing of either may be left."""
    yield {"TMPDIR": str(sock_dir), MARK: sock_dir.name, "PATH": f"{sock_dir / 'bin'}:{os.environ['PATH']}"}
    until(lambda: not _marked(sock_dir.name), "the demo's processes have ended")
    assert [path.name for path in sock_dir.iterdir() if path.name != "bin"] == []


def _marked(mark: str) -> list[int]:
    """Running processes that carry the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def _stand_in(env: dict[str, str], name: str, script: str) -> None:
    """Put a shell script before a program of that name; `$real` is the program."""
    path = Path(env["TMPDIR"]) / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\nreal={shutil.which(name)}\n{script}\n")
    path.chmod(0o755)


def _demo(env: dict[str, str], *args: str) -> dict[str, Any]:
    result = run_cli("demo", *SMALL, "--json", *args, env=env, timeout=50)
    assert (result.returncode, result.stderr) == (0, "")
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def _failure(env: dict[str, str], *args: str) -> str:
    """The one line of a demo that fails."""
    result = run_cli("demo", *SMALL, "--json", *args, env=env, timeout=50)
    assert result.returncode == 1, result
    assert result.stderr.startswith("nbdmirror: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("writer", ["fio", "own"])
@pytest.mark.parametrize("target", ["nbdkit", "nbdmirror"])
def test_every_claim_holds(env: dict[str, str], writer: str, target: str) -> None:
    require(*({writer, target} & {"fio", "nbdkit"}))
    facts = _demo(env, "--writer", writer, "--target", target)
    assert facts["ok"]
    assert facts["first-difference"] is None
    assert facts["file-system-clean"]
    assert facts["writer"] == writer
    assert facts["writes"] > 0
    assert facts["bytes-sent"] > 16 * MiB
    assert facts["bytes-of-zeroes-not-sent"] > 16 * MiB
    assert abs(facts["source-allocated"] - facts["target-allocated"]) <= facts["source-allocated"] / 100


def test_the_report_and_what_is_kept(env: dict[str, str]) -> None:
    result = run_cli("demo", *SMALL, "--keep", env=env, timeout=50)
    assert (result.returncode, result.stderr) == (0, "")
    directory = Path(result.stdout.rstrip().rpartition("kept: ")[2].splitlines()[0])
    assert filecmp.cmp(directory / "source.img", directory / "target.img", shallow=False)
    for text in ("nbdmirror serve", "nbdmirror mirror", "nbdmirror complete", "READY after", "identical", "All of it held"):
        assert text in result.stdout
    assert "FAILED" not in result.stdout
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("printf 'a planted difference' | dd of=$file bs=1 seek=20000000 conv=notrunc", "first at offset 200000"),
        ("printf 'a planted difference' | dd of=$file bs=1 seek=1080 conv=notrunc", "e2fsck on the target: "),
        ("fallocate --length 64M $file", "allocated: "),
    ],
)
def test_a_copy_that_is_not_the_same(env: dict[str, str], damage: str, text: str) -> None:
    require("nbdkit")
    # When told to stop, the server changes the copy behind everybody's back.
    script = (
        f'$real "$@" & child=$!; for last; do file=${{last#file=}}; done; trap "kill $child; wait; {damage}; exit 0" TERM; wait'
    )
    _stand_in(env, "nbdkit", script)
    failure = _failure(env, "--target", "nbdkit")
    assert "the demo failed: " in failure
    assert text in failure


def test_a_target_that_fails(env: dict[str, str]) -> None:
    require("nbdkit")
    _stand_in(env, "nbdkit", 'exec $real --filter=error "$@" error=ENOSPC error-pwrite-rate=100%')
    assert "No space left on device" in _failure(env, "--target", "nbdkit")


def test_a_target_that_does_not_start(env: dict[str, str]) -> None:
    _stand_in(env, "nbdkit", "echo no such luck >&2; exit 9")
    assert "nbdkit ended with status 9: no such luck" in _failure(env, "--target", "nbdkit")


def test_a_writer_that_ends(env: dict[str, str]) -> None:
    _stand_in(env, "fio", "case $1 in --enghelp=*) exit 0; esac; echo out of ink >&2; exit 9")
    assert "the writer (fio) ended with status 9: out of ink" in _failure(env, "--writer", "fio")


def test_no_fio(env: dict[str, str]) -> None:
    _stand_in(env, "fio", "exit 1")  # of its engine
    assert "use --writer own" in _failure(env, "--writer", "fio")
    assert _demo(env)["writer"] == "own"


def test_a_size_too_small(env: dict[str, str]) -> None:
    result = run_cli("demo", "--size", "1M", env=env)
    assert result.returncode == 2
    assert "64 MiB" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["Making", "Mirroring", "READY"])
def test_a_signal(env: dict[str, str], number: signal.Signals, moment: str) -> None:
    with _running(env) as demo:
        _read_until(demo, moment)
        demo.send_signal(number)
        output, errors = demo.communicate(timeout=30)
    assert demo.returncode == 128 + number
    assert errors == ""
    assert "held" not in output


def test_children_do_not_survive_a_kill(env: dict[str, str]) -> None:
    require("setpriv")
    with _running(env) as demo:
        _read_until(demo, "READY")
        assert len(_marked(env[MARK])) > 2
        demo.kill()
        demo.communicate(timeout=30)
    until(lambda: not _marked(env[MARK]), "the demo's children have ended")
    for left in Path(env["TMPDIR"]).glob("nbdmirror-demo-*"):
        shutil.rmtree(left)


def _running(env: dict[str, str]) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "nbdmirror", "demo", "--size", "64M", "--seconds", "600"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"},
    )


def _read_until(demo: subprocess.Popen[str], word: str) -> None:
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith(word):
            return
    pytest.fail(f"the demo ended without {word!r}: {demo.stderr.read() if demo.stderr else ''}")
