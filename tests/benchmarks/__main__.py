"""`./run bench`: nbdmirror and its peers side by side.

Rule: figures of one run compare with each other and with nothing else. What they say is in the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nbdmirror.errors import UsageError
from nbdmirror.units import parse_size
from tests.benchmarks import copying, machine, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from tests.benchmarks.report import Table


def main(arguments: Sequence[str]) -> int:
    """Measure, print the tables; returns the exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    # The servers and copiers that are started find the package where this process did.
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[2]))
    about = machine.describe()
    print(about, flush=True)
    found: dict[str, list[Table]] = {}
    try:
        for name, tables in _measure(options):
            found[name] = tables
            for table in tables:
                print(f"\n{table.markdown()}", flush=True)
    except machine.BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json is not None:
        content = {name: [table.as_json() for table in tables] for name, tables in found.items()}
        Path(options.json).write_text(json.dumps({"machine": about, **content}, indent=1) + "\n")
    return 0


def _measure(options: argparse.Namespace) -> Iterator[tuple[str, list[Table]]]:
    if options.what in {"server", "all"}:
        yield "server", serving.measure(options.runs, options.seconds, options.size or serving.DEFAULT_SIZE)
    if options.what in {"copy", "all"}:
        yield "copy", copying.measure(options.runs, options.size or copying.DEFAULT_SIZE)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("run bench", description="nbdmirror and its peers side by side, on files in memory.")
    parser.add_argument("what", nargs="?", choices=["server", "copy", "all"], default="all", help="what to measure (all)")
    parser.add_argument("--runs", type=_positive, help="how often each tool's turn comes (5)")
    parser.add_argument("--seconds", type=float, help="how long each request load lasts (2)")
    parser.add_argument("--quick", action="store_true", help="3 runs of 1 second")
    parser.add_argument("--size", type=_size, help="of the disk (server 1G, copy 4G)")
    parser.add_argument("--json", metavar="FILE", help="write every measurement there")
    options = parser.parse_args(arguments)
    options.runs = options.runs or (3 if options.quick else 5)
    options.seconds = options.seconds or (1.0 if options.quick else 2.0)
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _terminate(_number: int, _frame: FrameType | None) -> None:
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
