"""The NBD server of nbd-server-start, and exports as the monitor knows them: by id, made and deleted while the daemon runs.

Rules:
1. A listener has its own names: `serve`'s has its one export, this server has those of block-export-add. Otherwise an export of
   one could be reached past the TLS of the other.
2. An export that is being deleted is found by no new client. It is gone when what its clients had in flight is finished.
3. The bitmaps of an export are busy until it is gone, or until a pivot has put another disk under it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nbdmirror.errors import StateError
from nbdmirror.server.listener import Listener

if TYPE_CHECKING:
    from nbdmirror.bitmap.dirty import DirtyBitmap
    from nbdmirror.bitmap.named import NamedBitmap
    from nbdmirror.server.export import Export
    from nbdmirror.server.session import Session
    from nbdmirror.server.tls import Tls

# QEMU's: as long as the protocol lets a string be.
_MAX_STRING: Final = 4096


@dataclass(slots=True, eq=False)
class BlockExport:
    """An export by its id. `server` is None for the one of `serve`, which lasts as long as the daemon."""

    id: str
    export: Export
    uri: str
    server: NbdServer | None = None
    shutting_down: bool = False
    _shown: list[NamedBitmap] = field(default_factory=list)

    def show(self, bitmaps: list[NamedBitmap]) -> None:
        """Let clients look at these bitmaps, which are busy from now on."""
        shown: dict[str, DirtyBitmap] = {}
        for bitmap in bitmaps:
            shown[bitmap.name] = bitmap.bits
            bitmap.users.append(self._user)
        self.export.bitmaps = shown
        self._shown = bitmaps

    def release_bitmaps(self) -> None:
        """Show them no more."""
        if self._shown:
            self.export.bitmaps = {}
        for bitmap in self._shown:
            bitmap.users.remove(self._user)
        self._shown = []

    @property
    def _user(self) -> str:
        return f"export {self.id}"

    def disconnect(self) -> list[Session]:
        """Hide it from new clients and hang up on those it has; returns these, who may have requests in flight."""
        self.shutting_down = True
        if self.server is not None:
            self.server.exports.pop(self.export.name)
        sessions = list(self.export.sessions)
        for session in sessions:
            session.abort()
        return sessions


class NbdServer:
    """A server and its exports by their NBD names. Raises ListenError and UsageError where it cannot listen."""

    def __init__(self, address: str | tuple[str, int], tls: Tls, *, max_clients: int, haggling: float) -> None:
        self.exports: dict[str, Export] = {}
        # To the only client there can be, nothing need be said about several.
        self.multi_conn = max_clients != 1
        if isinstance(address, str):
            self._listener = Listener.unix(address, self.exports, max_clients=max_clients, haggling=haggling, tls=tls)
        else:
            self._listener = Listener.tcp(*address, self.exports, max_clients=max_clients, haggling=haggling, tls=tls)

    async def start(self) -> None:
        """Begin to accept."""
        await self._listener.start()

    def uri(self, name: str) -> str:
        """Where clients find an export of that name."""
        return self._listener.endpoints(name)[0].uri

    def check_offer(self, name: str, description: str) -> None:
        """Raises StateError where an export's name is taken, or where the protocol could not say it."""
        if len(name.encode()) > _MAX_STRING:
            raise StateError(f"export name '{name}' too long")
        if len(description.encode()) > _MAX_STRING:
            raise StateError(f"description '{description}' too long")
        if name in self.exports:
            raise StateError(f"NBD server already has export named '{name}'")

    async def aclose(self) -> None:
        """Stop listening, finish what was accepted, hang up."""
        await self._listener.aclose()
