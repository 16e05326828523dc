#!/usr/bin/env python3
"""What the nbdkit plugins next to this file share: a control socket and its client, and how they read parameters.

A line of text asks, a line of JSON answers; a connection may ask any number of times:

    python3 plugins/control.py SOCKET COMMAND [WORDS...]

Rules:
1. It is no part of the product and imports none of it: a copy of plugins/ works wherever nbdkit's Python plugin does.
2. The socket is bound before nbdkit forks, so that a bad path is an error of the command line, and served by threads that are
   started after, for threads do not survive a fork.
3. A socket that a killed nbdkit has left behind is replaced; one that somebody listens on is not.
4. Only the user that runs nbdkit may connect.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LINE_MAX: Final = 65536  # bytes of a question; longer ones end the connection


def refuse(message: str) -> NoReturn:
    """End nbdkit while it reads its command line: it would show an exception as a traceback."""
    os.write(2, f"nbdkit: error: {message}\n".encode())
    os._exit(1)


def parse_size(text: str) -> int:
    """Bytes, from what nbdkit takes for a size, as 512 or 64k or 1G. Raises ValueError."""
    number, power = (text[:-1], "kmgt".find(text[-1].lower()) + 1) if text[-1:].isalpha() else (text, 0)
    if not number.isdecimal() or (power == 0 and number != text):
        raise ValueError(f"{text!r} is no size: give one like 512, 64k or 1G")
    return int(number) << 10 * power


def parse_probability(text: str) -> float:
    """A number from 0 to 1, from 0.5 or 50%. Raises ValueError."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise ValueError(f"{text!r} is no probability: give one like 0.5 or 50%")
    return value


class Control:
    """A Unix socket at `path` that answers commands. Each takes the rest of its line; a ValueError is an answer, too."""

    def __init__(self, path: str, commands: Mapping[str, Callable[[str], object]]) -> None:
        self.path = path

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with suppress(OSError):  # a client that has gone
                    while (line := self.rfile.readline(_LINE_MAX)).endswith(b"\n"):
                        self.wfile.write(json.dumps(_answer(commands, line.decode(errors="replace"))).encode() + b"\n")

        _remove_left_over(path)
        umask = os.umask(0o177)
        try:
            self._server = socketserver.ThreadingUnixStreamServer(path, Handler)
        except OSError as error:
            refuse(f"control={path}: {error.strerror or error}")
        finally:
            os.umask(umask)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], name="control", daemon=True)

    def start(self) -> None:
        """Answer from now on; to be called in after_fork()."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more, and remove the socket; to be called in cleanup()."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()
        Path(self.path).unlink(missing_ok=True)


def _remove_left_over(path: str) -> None:
    """Remove a socket that nobody listens on: an nbdkit that was killed leaves its own."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
        except OSError:  # mostly: there is none
            pass


def _answer(commands: Mapping[str, Callable[[str], object]], line: str) -> object:
    name, _, rest = line.strip().partition(" ")
    if name not in commands:
        return {"error": f"no such command: {name!r}; there are: {', '.join(commands)}"}
    try:
        return commands[name](rest.strip())
    except ValueError as error:
        return {"error": str(error)}


def ask(path: str, line: str) -> str:
    """Send one command; the line of JSON that answers it. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rw") as stream:
        client.connect(path)
        stream.write(f"{line}\n")
        stream.flush()
        return stream.readline().rstrip("\n")


def main() -> None:
    """Ask from the command line; status 1 if there is nobody to ask, or no such command."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    path, *words = sys.argv[1:]
    try:
        answer = ask(path, " ".join(words))
    except OSError as error:
        sys.exit(f"control.py: {path}: {error.strerror or error}")
    if not answer:
        sys.exit(f"control.py: {path}: ended without an answer")
    print(answer)
    sys.exit(1 if "error" in json.loads(answer) else 0)


if __name__ == "__main__":
    main()
