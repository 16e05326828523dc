"""Sessions of real clients, recorded by a relay, mutated from a seed and played to a server.

sessions = await record(unix, sock_dir, commands)       what each connection of the commands said, in the pieces it said it in
await play(unix, mutated(sessions, rng), rng)            to the end that the server makes, or as far as anybody would listen
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from typing import TYPE_CHECKING, Final

import pytest

from nbdmirror.protocol import constants as c
from nbdmirror.units import KiB, MiB
from tests.support.tools import TOOL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from random import Random

Session = list[bytes]

# How many mutated sessions a test plays; the full measure is in CONTRIBUTING.md.
PLAYED: Final = int(os.environ.get("NBDMIRROR_TEST_SESSIONS", "5000"))
# What a server takes to answer one session, or to hang up. It takes a millisecond.
_BOUND: Final = 20.0
# More of the answers than this nobody needs to see.
_ENOUGH: Final = 256 * KiB
# A client that waits for its answer does so for this long: the mutated one may never come.
_TURN_SECONDS: Final = 0.002
_MAGICS: Final = tuple(
    magic.to_bytes(length, "big") for magic, length in ((c.IHAVEOPT, 8), (c.REQUEST_MAGIC, 4), (c.EXTENDED_REQUEST_MAGIC, 4))
)
_NUMBERS: Final = (0, 1, 2, 3, 7, 8, 511, 512, 4095, 4096, 4097, 65536, MiB, 32 * MiB, c.MAX_PAYLOAD, c.MAX_PAYLOAD + 1)
_LARGE: Final = (c.MAX_OPTION_LENGTH, c.MAX_OPTION_LENGTH + 1, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 1)


# --- recording -------------------------------------------------------------------------------------------------------


async def record(unix: Path, sock_dir: Path, commands: Iterable[Sequence[str]]) -> list[Session]:
    """Run commands one after another, `{socket}` in them being the relay's; each has to succeed."""
    sessions: list[Session] = []
    relays: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        relays.add(task)
        session: Session = []
        sessions.append(session)
        back, forth = await asyncio.open_unix_connection(unix)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(_pump(reader, forth, session), _pump(back, writer))
        for each in (writer, forth):
            each.transport.abort()

    server = await asyncio.start_unix_server(relay, sock_dir / "relay")
    async with server:
        for command in commands:
            await _run([word.replace("{socket}", f"{sock_dir}/relay") for word in command])
        if relays:
            await asyncio.wait(relays, timeout=TOOL_SECONDS)
    return [session for session in sessions if session]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record_in: Session | None = None) -> None:
    while data := await reader.read(MiB):
        if record_in is not None:
            record_in.append(data)
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _run(argv: Sequence[str]) -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(TOOL_SECONDS):
        _, said = await process.communicate()
    if process.returncode:
        pytest.fail(f"{' '.join(argv)}: {said.decode()}")


# --- mutating --------------------------------------------------------------------------------------------------------


def mutated(sessions: Sequence[Session], rng: Random) -> Session:
    """One of the sessions with one to four things wrong, and now and then one as it was."""
    pieces = list(rng.choice(sessions))
    if rng.random() < 0.2:
        other = rng.choice(sessions)
        pieces = pieces[: rng.randint(0, len(pieces))] + other[rng.randint(0, len(other)) :]
    for _ in range(rng.randint(0, 4)):
        if pieces:
            at = rng.randrange(min(len(pieces), 12))
            pieces[at] = _changed(bytearray(pieces[at]), sessions, rng)
    if rng.random() < 0.1:
        rng.shuffle(pieces)
    return [piece for piece in pieces if piece]


def _changed(data: bytearray, sessions: Sequence[Session], rng: Random) -> bytes:
    at = _place(data, rng)
    length = rng.choice((1, 1, 2, 4, 8, 16, 28, rng.randint(1, 300)))
    match rng.randrange(9):
        case 0 if data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        case 1:
            data[at : at + 1] = rng.randbytes(1)
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = rng.randbytes(length)
        case 4:
            data[at:at] = data[at : at + length] * rng.choice((1, 1, 2, 40))
        case 5:
            del data[at:]
        case 6:
            data[at : at + 4] = struct.pack(">I", rng.choice((*_NUMBERS, *_LARGE)))
        case 7:
            data[at : at + 8] = struct.pack(">Q", rng.choice((*_NUMBERS, *_LARGE, 2**63, 2**64 - 1)))
        case _:
            piece = rng.choice(rng.choice(sessions))
            data[at:] = piece[_place(piece, rng) :]
    return bytes(data)


def _place(data: bytes | bytearray, rng: Random) -> int:
    """Somewhere in the data, most often near where a message begins: most of the bytes are payload."""
    start = rng.randint(0, len(data))
    found = data.find(rng.choice(_MAGICS), start)
    if found < 0 or rng.random() < 0.2:
        found = rng.choice((0, start))
    return min(found + rng.randint(0, 31), len(data))


# --- playing ---------------------------------------------------------------------------------------------------------


async def play(unix: Path, session: Session, rng: Random) -> None:
    """Say it all, in turn with the server or at once; then vanish, or hear the server out."""
    takes_turns, vanishes = rng.random() < 0.3, rng.random() < 0.3
    reader, writer = await asyncio.open_unix_connection(unix)
    try:
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(_BOUND):
                for piece in session:
                    if writer.transport.is_closing():
                        return
                    writer.write(piece)
                    if takes_turns:
                        await _turn(reader)
                if not vanishes and not writer.transport.is_closing():
                    writer.write_eof()
                    await _hear_out(reader)
    except TimeoutError:
        pytest.fail(f"neither answered nor hung up on: {session!r:.2000}")
    finally:
        writer.transport.abort()


async def _turn(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_TURN_SECONDS):
            await reader.read(64 * KiB)


async def _hear_out(reader: asyncio.StreamReader) -> None:
    heard = 0
    while heard < _ENOUGH and (data := await reader.read(64 * KiB)):
        heard += len(data)
