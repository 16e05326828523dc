"""`./run bench`: nbdmirror and its peers side by side.

Rule: figures of one run compare with each other and with nothing else. What they say is in the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdmirror.errors import UsageError
from nbdmirror.units import parse_size
from tests.benchmarks import bitmaps, copying, machine, mirroring, serving
from tests.benchmarks.goals import markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import FrameType

    from tests.benchmarks.goals import Row


def main(arguments: Sequence[str]) -> int:
    """Measure, print the tables; returns the exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    # The servers and copiers that are started find the package where this process did.
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[2]))
    about = machine.describe()
    print(about, flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        if options.what in {"server", "all"}:
            found["server"] = _with_goals(serving.measure(_options(options, serving.DEFAULT_SIZE)))
        if options.what in {"copy", "all"}:
            found["copy"] = _copies(options)
        if options.what in {"mirror", "all"}:
            found["mirror"] = _with_goals(mirroring.measure(_options(options, mirroring.DEFAULT_SIZE)))
        if options.what in {"bitmap", "all"}:
            found["bitmap"] = _with_goals(bitmaps.measure(_options(options, bitmaps.DEFAULT_SIZE)))
    except machine.BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json is not None:
        Path(options.json).write_text(json.dumps({"machine": about, **found}, indent=1) + "\n")
    return 0


def _options(options: argparse.Namespace, size: int) -> serving.Options:
    size = options.size or size
    return serving.Options(options.runs, options.seconds, size, options.only, options.directory, options.wait)


def _with_goals(found: Iterable[Row]) -> list[dict[str, Any]]:
    """Measure; each row is said as it is finished, and all of them are in the end."""
    rows: list[Row] = []
    try:
        for row in found:
            rows.append(row)
            print(f"bench: {row}", file=sys.stderr)
    finally:
        if rows:
            print(f"\n{markdown(rows)}\n\n{serving.summary(rows)}", flush=True)
    return [row.as_json() for row in rows]


def _copies(options: argparse.Namespace) -> list[dict[str, Any]]:
    tables = copying.measure(options.runs, options.size or copying.DEFAULT_SIZE)
    for table in tables:
        print(f"\n{table.markdown()}", flush=True)
    return [table.as_json() for table in tables]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("run bench", description="nbdmirror and its peers side by side.")
    what = ["server", "copy", "mirror", "bitmap", "all"]
    parser.add_argument("what", nargs="?", choices=what, default="all", help="what to measure (all)")
    parser.add_argument("--runs", type=_positive, help="how often each tool's turn comes (5)")
    parser.add_argument("--seconds", type=float, help="how long each request load lasts (0.6)")
    parser.add_argument("--quick", action="store_true", help="3 runs of 0.5 seconds")
    parser.add_argument(
        "--only", type=_pattern, default=re.compile(""), help="rows that this pattern is found in, but of `copy`"
    )
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on a real file system (/var/tmp)")
    parser.add_argument("--size", type=_size, help="of the disk (server and bitmap 1G, copy and mirror 4G)")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds at most, before each turn, for an idle machine (0)")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there")
    options = parser.parse_args(arguments)
    options.runs = options.runs or (3 if options.quick else 5)
    options.seconds = options.seconds or (0.5 if options.quick else 0.6)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}") from None


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _terminate(_number: int, _frame: FrameType | None) -> None:
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
