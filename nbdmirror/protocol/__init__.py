"""The NBD wire, without I/O: bytes in, events out; replies in, bytes out.

Nothing here knows of sockets, files or time, so every byte of it can be tested in memory. The source is the NBD protocol
text (doc/proto.md of the NetworkBlockDevice project); docstrings name its sections.
"""
