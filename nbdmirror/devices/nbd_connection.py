"""NbdConnection: one libnbd handle, driven by the running event loop. The only module that imports `nbd`.

Rules:
1. One thread, one loop, only `aio_*` calls. The loop watches `aio_get_fd()` in the directions that `aio_get_direction()` names;
   they are asked for again after every call that may change them.
2. libnbd calls back under the handle's lock. A callback appends to a list and returns, nothing else: any call on the handle
   from there would deadlock, and an exception would be swallowed. Futures resolve once libnbd's call has returned.
3. A notification which the state does not expect is an error in libnbd, and one without data behind it makes it hold back
   new commands: so the direction is checked again before each, and none is ever sent on speculation.
4. When the peer is gone, libnbd has closed its fd already. The loop is told at once, by the number remembered, since the next
   socket to be opened may get it. Every pending command then fails, whether or not libnbd called back for it: for
   a handle that is dropped with commands in flight it never does.
5. libnbd holds each buffer until its command is retired; so a cancelled caller is harmless, but the *content* of its
   buffer stays in use: after a cancelled read or write, drop the buffer, do not use it again.
6. A handle that is closed or dead can't be connected again. Make another NbdConnection.
7. libnbd verifies a server's certificate only against a host name that it was given itself (CVE-2024-7383), so TLS goes
   through its own connect call, and x509 over a transport without host names is refused.
8. A connection whose server owes answers and is silent for too long is hung (`nbd_patience`). Giving it up leaves its socket
   to a Wake: the server may still be at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from typing import TYPE_CHECKING, Final, TypeAlias

from nbdmirror.devices.nbd_patience import Patience
from nbdmirror.devices.nbd_setup import (
    READ,
    WRITE,
    ExportInfo,
    Handle,
    abort_when_closed,
    connect_failure,
    learn,
    resolve,
    set_up_tls,
    start_connecting,
    wait_for_fd,
)
from nbdmirror.devices.nbd_wake import Wake
from nbdmirror.errors import DeviceError, UsageError
from nbdmirror.protocol.constants import BASE_ALLOCATION, FUA
from nbdmirror.sockets import widen_unix_send_buffer

if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import c_int

    from nbdmirror.devices.uri import NbdEndpoint

try:
    import nbd
except ImportError:  # said when a connection is wanted: everything else works without
    nbd = None

# Seconds for a server to be found, connected to and agreed with; as long as a TCP connect may take with two packets lost.
CONNECT_TIMEOUT: Final = 10.0
# Seconds that an orderly goodbye may take; a server that does not answer is dropped after that.
CLOSE_TIMEOUT: Final = 5.0
# What has a server wait for its disk, as everything with FUA does.
_SLOW: Final = frozenset({"flush", "zero", "trim"})
_MISSING: Final = (
    "NBD needs libnbd's Python binding: apt install python3-libnbd, or your distribution's package of it "
    "(the package called nbd on PyPI is something else)"
)

Buffer: TypeAlias = bytearray | memoryview
Data: TypeAlias = bytes | bytearray | memoryview


class NbdConnection:
    """One connection to an export, ready for commands. Construct it with `connect`.

    Every command returns at once with a future, or raises DeviceError when it can't even be sent. A future fails with
    DeviceError: the server's errno, ENOTCONN when the connection is lost, ETIMEDOUT when it was given up. Nothing bounds the
    commands in flight. `on_gone` is called once, when the connection has ended in whatever way, before anybody hears that his
    command failed. `on_hung` is called when the server has been silent for too long, and is to give the connection up.
    """

    info: ExportInfo

    def __init__(self, handle: Handle, name: str, request_timeout: float | None) -> None:
        self.name = name
        self.on_gone: Callable[[NbdConnection], None] | None = None
        self.on_hung: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._handle: Handle | None = handle
        self._fd = -1
        self._watched = 0
        self._closing = False
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._drained: asyncio.Future[None] | None = None
        # What was asked, by future, for the text of a failure; and what libnbd reported since the last settlement.
        self._pending: dict[asyncio.Future[None], tuple[str, tuple[object, ...]]] = {}
        self._completed: list[tuple[asyncio.Future[None], int]] = []
        self._request_timeout = request_timeout
        self._patience: Patience | None = None

    @classmethod
    async def connect(
        cls, endpoint: NbdEndpoint, *, name: str = "", timeout: float = CONNECT_TIMEOUT, request_timeout: float | None = None
    ) -> NbdConnection:
        """Connect within `timeout` seconds; `name` is for messages, the URI where it is empty.

        Raises DeviceError, or UsageError where libnbd or safe TLS is missing.
        """
        _require_libnbd()
        name = name or endpoint.uri
        deadline = asyncio.get_running_loop().time() + timeout
        # libnbd looks names up where it stands. It must have the name for TLS (rule 7): then it does so in a thread.
        hosts = await resolve(endpoint, timeout) if endpoint.transport == "tcp" and not endpoint.tls else [endpoint.host]
        failure = DeviceError(errno.EHOSTUNREACH, f"cannot connect to {name}")
        for tried, host in enumerate(hosts):  # the time left is shared evenly by those not yet tried
            share = (deadline - asyncio.get_running_loop().time()) / (len(hosts) - tried)
            connection = cls(_new_handle(endpoint), name, request_timeout)
            try:
                await connection._open(endpoint, host, share)
            except DeviceError as error:
                failure = error
            else:
                return connection
        raise failure

    async def _open(self, endpoint: NbdEndpoint, host: str, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await asyncio.to_thread(start_connecting, self._live, endpoint, host)
                await self._handshake()
            self.info = learn(self._live)
            self._fd = self._live.aio_get_fd()
            widen_unix_send_buffer(self._fd)
            abort_when_closed(self._fd)
            if self._request_timeout is not None:
                self._patience = Patience(self._request_timeout, self._fd, self._hung)
            self._update()
        except TimeoutError:
            failure = DeviceError(errno.ETIMEDOUT, f"cannot connect to {self.name}")
        except nbd.Error as error:
            failure = connect_failure(error, self.name)
        except BaseException:
            self._lose()
            raise
        else:
            if self.info.size >= 0:
                return
            size = self.info.size % 2**64  # libnbd lets sizes from 2**63 on through (CVE-2023-5215)
            failure = DeviceError(errno.EFBIG, f"{self.name}: the server's size for it, {size} bytes, is out of range")
        self._lose()
        raise failure  # out here, where it does not carry libnbd's frames along: those keep the handle open

    async def _handshake(self) -> None:
        """Step through connecting and negotiation. The fd may be another one at each step: libnbd tries several addresses."""
        while self._live.aio_is_connecting():
            direction = self._live.aio_get_direction()
            ready = await wait_for_fd(self._loop, self._live.aio_get_fd(), direction)
            if ready & READ:
                self._live.aio_notify_read()
            else:
                self._live.aio_notify_write()
        if not self._live.aio_is_ready():
            raise DeviceError(errno.ECONNRESET, f"cannot connect to {self.name}")

    @property
    def in_flight(self) -> int:
        """Commands sent or queued that the server has not answered, those included that nobody waits for any more."""
        return len(self._pending)

    @property
    def is_alive(self) -> bool:
        """Whether commands can be sent; False for good once the connection was lost or closed."""
        return self._handle is not None and not self._closing

    @property
    def _live(self) -> Handle:
        if self._handle is None or self._closing:
            raise DeviceError(errno.ENOTCONN, f"{self.name}: the connection is {'closed' if self._closing else 'lost'}")
        return self._handle

    def pread(self, buffer: Buffer, offset: int) -> asyncio.Future[None]:
        """Fill `buffer`; it is in use until the future is done, and for longer if that was cancelled (rule 5)."""
        return self._issue("read", self._live.aio_pread, 0, buffer, offset)

    def pwrite(self, data: Data, offset: int, flags: int = 0) -> asyncio.Future[None]:
        """Write `data`, which is not copied. Flags: FUA."""
        return self._issue("write", self._live.aio_pwrite, flags, data, offset)

    def zero(self, offset: int, length: int, flags: int = 0) -> asyncio.Future[None]:
        """Write zeroes. Flags: FUA, NO_HOLE, FAST_ZERO."""
        return self._issue("zero", self._live.aio_zero, flags, length, offset)

    def trim(self, offset: int, length: int, flags: int = 0) -> asyncio.Future[None]:
        """Discard. Flags: FUA."""
        return self._issue("trim", self._live.aio_trim, flags, length, offset)

    def cache(self, offset: int, length: int) -> asyncio.Future[None]:
        """Have the server read ahead."""
        return self._issue("cache", self._live.aio_cache, 0, length, offset)

    def flush(self) -> asyncio.Future[None]:
        """Make durable every write that has been answered."""
        return self._issue("flush", self._live.aio_flush, 0)

    async def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """`base:allocation` from `offset` on as `(length, flags)`; may cover less or, with its last extent, more than asked."""
        numbers: list[int] = []

        def extents(context: str, _offset: int, entries: list[int], error: c_int) -> int:
            try:
                if context == BASE_ALLOCATION:
                    numbers.extend(entries)
            except BaseException:  # rule 2
                error.value = errno.EIO
                return -1
            return 0

        await self._issue("block status", self._live.aio_block_status, 0, length, offset, extents)
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _issue(self, what: str, start: Callable[..., int], flags: int, *arguments: object) -> asyncio.Future[None]:
        future = self._loop.create_future()
        completed = self._completed

        def completion(error: c_int) -> int:
            try:
                completed.append((future, error.value))
            except BaseException:  # rule 2; a signal's exception may come up anywhere
                completed.append((future, errno.EINTR))
            return 1

        try:
            start(*arguments, completion, flags)
        except nbd.Error as error:
            number = error.errnum
        else:
            if self._patience is not None:
                self._patience.begun(future, is_slow=what in _SLOW or bool(flags & FUA))
            # Only now, when libnbd has taken it. It may have called back already, but nothing settles before _update.
            self._pending[future] = (what, arguments)
            self._update()
            return future
        self._update()
        raise self._failure(what, arguments, number if self._handle is not None else errno.ENOTCONN)

    def _readable(self) -> None:
        self._notify(READ)

    def _writable(self) -> None:
        self._notify(WRITE)

    def _notify(self, direction: int) -> None:
        handle = self._handle
        if handle is None:
            return
        try:
            if handle.aio_get_direction() & direction:
                if direction == READ:
                    handle.aio_notify_read()
                else:
                    handle.aio_notify_write()
                if self._patience is not None:
                    self._patience.moved()
        except nbd.Error:
            pass  # the connection broke, which its direction shows as well
        self._update()

    def _hung(self) -> None:
        if self.on_hung is not None:
            self.on_hung()
        else:
            self._lose(errno.ETIMEDOUT)

    def give_up(self) -> Wake | None:
        """Drop the connection while the server may be at work; pending commands fail with ETIMEDOUT. None if it is gone."""
        if self._handle is None:
            return None
        wake = None
        with contextlib.suppress(OSError):  # too many open files: then nobody can wait for the server
            wake = Wake(self._fd)
        self._lose(errno.ETIMEDOUT)
        return wake

    def _update(self) -> None:
        """Resolve what has completed and watch what libnbd now waits for; a handle that waits for nothing is gone."""
        if self._completed:
            self._settle()
        if self._handle is None:
            return
        direction = self._handle.aio_get_direction()
        if direction == 0:
            self._lose()
        elif direction != self._watched:
            self._watch(direction)

    def _settle(self) -> None:
        # set_result only schedules, so nothing can complete meanwhile.
        for future, error in self._completed:
            if self._patience is not None and future in self._pending:
                self._patience.ended(future)
            what, arguments = self._pending.pop(future, ("", ()))
            if future.done():  # cancelled
                continue
            if error:
                future.set_exception(self._failure(what, arguments, error))
            else:
                future.set_result(None)
        self._completed.clear()
        if self._drained is not None and not self._pending and not self._drained.done():
            self._drained.set_result(None)

    def _watch(self, direction: int) -> None:
        changed = direction ^ self._watched
        self._watched = direction
        if changed & READ:
            if direction & READ:
                self._loop.add_reader(self._fd, self._readable)
            else:
                self._loop.remove_reader(self._fd)
        if changed & WRITE:
            if direction & WRITE:
                self._loop.add_writer(self._fd, self._writable)
            else:
                self._loop.remove_writer(self._fd)

    def _lose(self, error: int = errno.ENOTCONN) -> None:
        """The end, by whichever side: stop watching, drop the handle, fail what is pending. Idempotent."""
        if self._patience is not None:
            self._patience.stop()
        if self._watched:
            self._watched = 0
            for remove in (self._loop.remove_reader, self._loop.remove_writer):
                # With both watched, asyncio tells epoll of the change, which knows no closed fd; it is forgotten all the same.
                with contextlib.suppress(OSError):
                    remove(self._fd)
        self._handle = None
        pending, self._pending = self._pending, {}
        for future, (what, arguments) in pending.items():
            if not future.done():
                future.set_exception(self._failure(what, arguments, error))
        if not self._gone.done():
            self._gone.set_result(None)
            if self.on_gone is not None:
                self.on_gone(self)

    def _failure(self, what: str, arguments: tuple[object, ...], error: int) -> DeviceError:
        where = ""
        if arguments:
            length = len(arguments[0]) if isinstance(arguments[0], bytes | bytearray | memoryview) else arguments[0]
            where = f" of {length} bytes at {arguments[1]}"
        return DeviceError(error, f"{self.name}: {what}{where}")

    async def aclose(self, timeout: float = CLOSE_TIMEOUT) -> None:
        """Wait for what is in flight, say goodbye, and drop the server after at most `timeout` seconds. Idempotent."""
        try:
            async with asyncio.timeout(timeout):
                if self.is_alive:
                    self._closing = True
                    await self._say_goodbye()
                await asyncio.wait({self._gone})
        except TimeoutError:
            pass
        finally:
            self._lose()

    async def _say_goodbye(self) -> None:
        # nbdkit answers ESHUTDOWN to the commands which it still works on when the goodbye arrives.
        if self._pending:
            self._drained = self._loop.create_future()
            await asyncio.wait({self._drained, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        if self._handle is not None:
            try:
                self._handle.aio_disconnect()
            except nbd.Error:
                self._lose()
            self._update()

    def __repr__(self) -> str:
        state = "closed" if self._closing else "lost" if self._handle is None else f"{self.in_flight} in flight"
        return f"<NbdConnection {self.name} {state}>"


def _require_libnbd() -> None:
    # PyPI's package of this name is there, too, on some machines: it has no NBD.
    if nbd is None or not hasattr(nbd, "NBD"):
        raise UsageError(_MISSING)


def _new_handle(endpoint: NbdEndpoint) -> Handle:
    handle = nbd.NBD()
    handle.add_meta_context(BASE_ALLOCATION)
    # Clearing each buffer before it is read into costs a pass over it; we never look at one whose read failed.
    if hasattr(handle, "set_pread_initialize"):
        handle.set_pread_initialize(False)
    handle.set_export_name(endpoint.export)
    if endpoint.tls is not None:
        set_up_tls(handle, endpoint, endpoint.tls)
    return handle
