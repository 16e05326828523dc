"""The haggling, as far as a listener's exports can answer it.

Rule: what a client asks about exports is answered here; what changes the connection is the session's to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdmirror.protocol.constants import OptionReply
from nbdmirror.protocol.messages import Disconnected, ExportQuery, ListQuery, MetaContextQuery, Opened, StartTls

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdmirror.protocol.connection import ServerConnection
    from nbdmirror.server.export import Export


def haggle(connection: ServerConnection, exports: Mapping[str, Export]) -> Opened | StartTls | Disconnected | None:
    """Answer queries up to an event that is the session's; None when more bytes are needed."""
    while (event := connection.next_event()) is not None:
        match event:
            case ExportQuery(name=name):
                export = exports.get(name)
                if export is None:
                    connection.refuse(OptionReply.ERR_UNKNOWN, f"export '{name}' not present")
                else:
                    connection.accept(export.info())
            case ListQuery():
                connection.list_exports([(export.name, export.description) for export in exports.values()])
            case MetaContextQuery(export=name):
                export = exports.get(name)
                if export is None:
                    connection.refuse(OptionReply.ERR_UNKNOWN, f"export '{name}' not present")
                else:
                    connection.offer_contexts(export.info().contexts)
            case Opened() | StartTls() | Disconnected():
                return event
    return None
