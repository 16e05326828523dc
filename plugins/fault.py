#!/usr/bin/env python3
"""fault.py: a disk that errs, delays, tears, hangs, lies and crashes, as told and by a seed; a plugin for nbdkit >= 1.32.

    nbdkit python plugins/fault.py size=1G fault='write at=100 error=ENOSPC' control=/tmp/control

    file=PATH            the disk is this file or block device
    size=SIZE            the disk is memory of this size, instead
    seed=NUMBER          what all chance comes from (0): the same requests in the same order meet the same faults
    fault=RULE           repeatable, see below
    volatile=P           a write stays in a volatile cache with this probability (0; 0.5 or 50%), see below
    block-size=MIN:PREFERRED:MAX     advertised, and a request that keeps them not is refused with EINVAL
    without=WORD,...     the disk lacks: flush fua trim fast-zero multi-conn cache extents (nbdkit then says: all is data)
    control=SOCKET       takes commands while it runs: python3 plugins/control.py SOCKET COMMAND

A rule is KIND[,KIND...] ACTION [OPTION...]; `any` is every kind.

    kinds    read write zero trim flush extents cache, of which the first four, extents and cache have a range
             fua         making a write, zero or trim with the flag FUA durable, once it is carried out
             fast-zero   a zero with the flag FAST_ZERO, before it counts as a zero: `fast-zero error=EOPNOTSUPP` refuses them
             connect     before the handshake; open: when the client has chosen the export
    actions  error=EIO   fails; nbdkit can tell clients EPERM EIO ENOMEM EINVAL ENOSPC ESHUTDOWN, and of a fast zero
                         EOPNOTSUPP; after EOPNOTSUPP of another zero it writes zeroes instead
             delay=SECONDS      and goes on to the next rule
             hang        until `release` or `clear`, then goes on; so long nbdkit ends by SIGKILL only
             torn[=N]    a write, zero or trim does its first N bytes, or some by the seed, and fails with EIO
             short=N     a write, zero or trim does its first N bytes and succeeds; extents tells of no more than N
             lie         a write, zero, trim, flush or fua does nothing and succeeds
             disconnect=WHEN    every connection is cut, one after the other: before it is done; unanswered: done, but
                         not answered; answered: this request is
             crash       SIGKILL, before it is done
    options  from=N to=N requests that touch this range        at=N     from the Nth such request on, which is the first (1)
             times=N     so many times (for ever)              p=P      with this probability

Commands: `add RULE`, `remove NUMBER`, `clear` (all rules, and what hangs goes on), `release` (what hangs goes on), `counts`,
`resize SIZE` (what clients see who connect from now on), `crash` (SIGKILL).

With volatile=P the file or memory is the stable storage: a sector of 4 KiB that is written goes there at once, or, with
probability P, when it is flushed. Whenever nbdkit is killed, the file has all that was flushed, and of the rest, sector by
sector, what the seed kept. Sectors in the cache take their size in memory.

nbdkit 1.32 does not tell a plugin which connection a request came on, so there is no cutting off just one of them (and with
`nbdkit -s` none); it always speaks the protocol correctly. For a disk without zeroing there is nbdkit --filter=nozero.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

try:
    import nbdkit
except ImportError:
    sys.exit(__doc__)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from control import Control, parse_probability, parse_size, refuse
from fault_rules import ACTIONS, KINDS, Faults
from volatile_disk import Disk

if TYPE_CHECKING:
    from fault_rules import CarryOut, Rule

API_VERSION = 2

_FEATURES: Final = frozenset({"flush", "fua", "trim", "fast-zero", "multi-conn", "cache", "extents"})

_settings: dict[str, str] = {"seed": "0", "volatile": "0", "block-size": "", "without": ""}
_first_rules: list[str] = []
_without: frozenset[str] = frozenset()
_block_size: tuple[int, int, int] = (0, 0, 0)  # nothing is advertised
_inherited: set[int] = set()
_control: Control | None = None
disk: Disk
faults: Faults


# --- faults ----------------------------------------------------------------------------------------------------------


def _inflict(rule: Rule, lot: float, carry_out: CarryOut, length: int) -> None:
    match rule.action, rule.value:
        case "error", number:
            _fail(number, rule.text)
        case "torn", given:
            carry_out(min(length, int(lot * length) // 512 * 512 if given is None else given))
            _fail(errno.EIO, rule.text)
        case "short", given:
            carry_out(min(length, given))
        case "disconnect", "before":
            _cut_off(socket.SHUT_RDWR)
            _fail(errno.ESHUTDOWN, rule.text)  # which nobody hears
        case "disconnect", "unanswered":
            carry_out(length)
            _cut_off(socket.SHUT_RDWR)
        case "disconnect", _:
            carry_out(length)
            _cut_off(socket.SHUT_RD)  # nbdkit answers, and finds the end of the stream where it looks for the next request
        case "crash", _:
            crash()


def crash(_rest: str = "") -> NoReturn:
    """End at once, as kill -9 does."""
    while True:
        os.kill(os.getpid(), signal.SIGKILL)


def _fail(number: int, text: str) -> NoReturn:
    nbdkit.set_error(number)
    raise OSError(number, f"{os.strerror(number)} ({text})")


def _sockets() -> set[int]:
    return {int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.is_socket()}


def _cut_off(how: int) -> None:
    """Shut down every connection of a client: a stream that was not there before the first client and is not the control's."""
    for fd in _sockets() - _inherited:
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as stream:
            listening = stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if not listening and stream.getsockname() != _settings.get("control"):
                stream.shutdown(how)


# --- what nbdkit calls -----------------------------------------------------------------------------------------------


def dump_plugin() -> None:
    """`nbdkit python plugins/fault.py --dump-plugin`."""
    print(f"fault_kinds={','.join(sorted(KINDS))}\nfault_actions={','.join(ACTIONS)}", flush=True)


def thread_model() -> int:
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    if key == "fault":
        _first_rules.append(value)
    elif key in {"file", "control"}:
        _settings[key] = str(Path(value).absolute())  # nbdkit goes to / later
    elif key in _settings or key == "size":
        _settings[key] = value
    else:
        refuse(f"fault.py: no such parameter: {key}; python3 fault.py explains those that there are")


def config_complete() -> None:
    try:
        _configure()
    except ValueError as error:
        refuse(f"fault.py: {error}")
    except OSError as error:
        refuse(f"fault.py: {error.filename}: {error.strerror}")


def _configure() -> None:
    global disk, faults, _without, _block_size, _control  # noqa: PLW0603  a plugin is a module, and this its constructor
    if ("file" in _settings) == ("size" in _settings):
        raise ValueError("give either file=PATH or size=SIZE")
    _without = frozenset(filter(None, _settings["without"].split(",")))
    if wrong := sorted(_without - _FEATURES):
        raise ValueError(f"without={','.join(wrong)}: it can be without {', '.join(sorted(_FEATURES))}")
    if _settings["block-size"]:
        sizes = [parse_size(size) for size in _settings["block-size"].split(":")]
        if len(sizes) != 3:
            raise ValueError("block-size: give MINIMUM:PREFERRED:MAXIMUM")
        _block_size = sizes[0], sizes[1], sizes[2]
    if not _settings["seed"].isdecimal():
        raise ValueError(f"seed={_settings['seed']}: give a number")
    seed = int(_settings["seed"])
    fd = os.open(_settings["file"], os.O_RDWR | os.O_CLOEXEC) if "file" in _settings else os.memfd_create("fault.py")
    if "size" in _settings:
        os.ftruncate(fd, parse_size(_settings["size"]))
    disk, faults = Disk(fd, seed, parse_probability(_settings["volatile"])), Faults(seed, nbdkit.debug, _inflict)
    for text in _first_rules:
        faults.add(text)
    if "control" in _settings:
        commands = {"add": faults.add, "remove": faults.remove, "clear": faults.clear, "release": faults.release}
        _control = Control(_settings["control"], {**commands, "counts": counts, "resize": resize, "crash": crash})


def counts(_rest: str) -> dict[str, object]:
    return {"size": disk.size, "unflushed-sectors": disk.unflushed, **faults.counts()}


def resize(text: str) -> dict[str, int]:
    try:
        disk.resize(parse_size(text))
    except OSError as error:
        raise ValueError(f"resize {text}: {error.strerror}") from None
    return {"size": disk.size}


def after_fork() -> None:
    _inherited.update(_sockets())
    if _control:
        _control.start()


def cleanup() -> None:
    if _control:
        _control.stop()


def preconnect(_readonly: bool) -> None:
    faults.request("connect", lambda _: None)


def open(_readonly: bool) -> object:
    faults.request("open", lambda _: None)
    return "a connection"


def get_size(_h: object) -> int:
    return disk.size


def block_size(_h: object) -> tuple[int, int, int]:
    return _block_size


def can_flush(_h: object) -> bool:
    return "flush" not in _without


def can_fua(_h: object) -> int:
    return int(nbdkit.FUA_NONE if "fua" in _without else nbdkit.FUA_NATIVE)


def can_trim(_h: object) -> bool:
    return "trim" not in _without


def can_fast_zero(_h: object) -> bool:
    return "fast-zero" not in _without


def can_multi_conn(_h: object) -> bool:
    return "multi-conn" not in _without


def can_cache(_h: object) -> int:
    return int(nbdkit.CACHE_NONE if "cache" in _without else nbdkit.CACHE_NATIVE)


def can_extents(_h: object) -> bool:
    return "extents" not in _without


def _check(offset: int, length: int, *, beyond: int, most: int = 0) -> None:
    """As a strict disk does: the end may have come nearer since this client connected."""
    if offset + length > disk.size:
        _fail(beyond, f"{length} bytes at {offset} reach beyond the end")
    minimum = _block_size[0]
    if minimum and (offset % minimum or length % minimum or length > (most or length)):
        _fail(errno.EINVAL, f"{length} bytes at {offset} do not keep the block sizes")


def _make_durable(flags: int, offset: int, length: int) -> None:
    if flags & nbdkit.FLAG_FUA:
        faults.request("fua", lambda count: disk.flush(offset, count), offset, length)


def pread(_h: object, buf: memoryview, offset: int, _flags: int) -> None:
    _check(offset, len(buf), beyond=errno.EIO, most=_block_size[2])
    faults.request("read", lambda _: disk.read(buf, offset), offset, len(buf))


def pwrite(_h: object, buf: memoryview, offset: int, flags: int) -> None:
    _check(offset, len(buf), beyond=errno.ENOSPC, most=_block_size[2])
    faults.request("write", lambda count: disk.write(buf[:count], offset), offset, len(buf))
    _make_durable(flags, offset, len(buf))


def zero(_h: object, count: int, offset: int, flags: int) -> None:
    _check(offset, count, beyond=errno.ENOSPC)
    if flags & nbdkit.FLAG_FAST_ZERO:
        faults.request("fast-zero", lambda _: None, offset, count)
        if not flags & nbdkit.FLAG_MAY_TRIM:
            _fail(errno.EOPNOTSUPP, "zeroes that stay allocated are as slow as writes")
    make_zero = disk.punch if flags & nbdkit.FLAG_MAY_TRIM else disk.zero
    faults.request("zero", lambda done: make_zero(offset, done), offset, count)
    _make_durable(flags, offset, count)


def trim(_h: object, count: int, offset: int, flags: int) -> None:
    _check(offset, count, beyond=errno.ENOSPC)
    faults.request("trim", lambda done: disk.punch(offset, done), offset, count)
    _make_durable(flags, offset, count)


def flush(_h: object, _flags: int) -> None:
    faults.request("flush", lambda _: disk.flush(0, disk.size))


def cache(_h: object, count: int, offset: int, _flags: int) -> None:
    faults.request("cache", lambda _: None, offset, count)


def extents(_h: object, count: int, offset: int, _flags: int) -> list[tuple[int, int, int]]:
    _check(offset, count, beyond=errno.EIO)
    found: list[tuple[int, int, bool]] = []
    faults.request("extents", lambda told: found.extend(disk.extents(offset, max(1, told))), offset, count)
    hole = nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
    return [(at, length, hole if is_hole else 0) for at, length, is_hole in found]
