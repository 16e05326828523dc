"""What every test gets: uvloop, short socket paths, a check for leftovers, and in CI no skips.

Nothing of the package is imported here, so that a test of one layer never loads another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import uvloop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}

# Shared machines stall: a slow example is no failure, a hanging test meets its own timeout. In CI the examples differ from
# run to run, and a failing one is printed as a decorator to paste.
hypothesis.settings.register_profile("default", deadline=None, max_examples=100)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=200, derandomize=False, print_blob=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("ci" if IN_CI else "default")

SOCK_DIR_LIMIT = 60  # bytes; sun_path holds 108, which leaves 47 for a name
GRACE = 2.0  # seconds for children and tasks that are already on their way out


# --- the loop of the product ----------------------------------------------------------------------------------------


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every async test under uvloop, as the daemon runs."""
    return {"uvloop": uvloop.new_event_loop}


# --- in CI a skip is a failure; a process that outlives the run is one everywhere -------------------------------------

skipped: dict[str, str] = {}
strays: list[str] = []


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[report.nodeid] = reason.removeprefix("Skipped: ")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    deadline = time.monotonic() + GRACE
    while (left := _strays()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid, test in left.items():
        strays.append(f"{pid}: {_command(pid)}, started in {test}")
        _kill(pid)
    if ((IN_CI and skipped) or strays) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if IN_CI and skipped:
        terminalreporter.section("skipped, which CI does not allow", red=True)
        for nodeid, reason in sorted(skipped.items()):
            terminalreporter.line(f"{nodeid}: {reason}", red=True)
    if strays:
        terminalreporter.section("processes left behind", red=True)
        for stray in strays:
            terminalreporter.line(stray, red=True)


# --- nothing may outlive a test -------------------------------------------------------------------------------------

RUN_TAG = f"NBDMIRROR_TEST_RUN={os.getpid()}.{time.time_ns()}"


def pytest_configure() -> None:
    name, _, value = RUN_TAG.partition("=")
    os.environ[name] = value


def _strays() -> dict[int, str]:
    """Processes that a test of this run started and that are nobody's children any more, with the test's name."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # over, or another user's
            continue
        tests = [var for var in environ if var.startswith(b"PYTEST_CURRENT_TEST=")]
        if tests and RUN_TAG.encode() in environ:
            found[int(entry.name)] = os.fsdecode(tests[0]).partition("=")[2]
    return found


def _children() -> set[int]:
    """The pids of this process's living children."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update(map(int, (task / "children").read_text().split()))
        except OSError:  # a thread that has just ended
            continue
    return {pid for pid in pids if not _is_over(pid) and "multiprocessing" not in _command(pid)}


def _is_over(pid: int) -> bool:
    """Whether it has ended, even if nobody has collected its status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def _no_child_left() -> Iterator[None]:
    """Fail a test that leaves a child process behind, and end that child."""
    before = _children()
    yield
    deadline = time.monotonic() + GRACE
    while (left := _children() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left:
        commands = [f"{pid}: {_command(pid)}" for pid in sorted(left)]
        for pid in left:
            _kill(pid)
        pytest.fail("child processes left behind:\n  " + "\n  ".join(commands), pytrace=False)


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    """Fail an async test that leaves tasks running on its loop."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        left = (await asyncio.wait(left, timeout=GRACE))[1]
    if left:
        names = [repr(task) for task in left]
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=GRACE)
        pytest.fail("tasks left running:\n  " + "\n  ".join(names), pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First among the fixtures, so that it looks last; not autouse, which would give every plain test a loop.
    for item in items:
        marker = item.get_closest_marker("asyncio")
        if (
            marker is not None
            and isinstance(item, pytest.Function)
            and marker.kwargs.get("loop_scope", "function") == "function"
            and "_no_task_left" not in item.fixturenames
        ):
            item.fixturenames.insert(0, "_no_task_left")


# --- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sock_dir() -> Iterator[Path]:
    """Make a directory whose path is short enough for Unix sockets, which pytest's own `tmp_path` may not be."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) + len("/nbdm-12345678") > SOCK_DIR_LIMIT:
        parent = "/tmp"
    path = Path(tempfile.mkdtemp(prefix="nbdm-", dir=parent))
    assert len(os.fsencode(path)) <= SOCK_DIR_LIMIT
    yield path
    shutil.rmtree(path, ignore_errors=True)
