"""A control server that speaks QMP, the QEMU Machine Protocol, and knows nothing of disks.

`messages` writes what a server says; `json_stream` and `connection` read what a client says and keep the negotiation;
`schema` and `registry` turn handlers into commands, a handler's signature being the schema. All of these do no I/O.
`monitor` puts them on Unix sockets.
"""
