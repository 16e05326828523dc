"""The NBD server: `listener` accepts, `session` joins a socket to the protocol core, `service` carries the requests of a client
that has opened an export, `export` answers from a disk, `contexts` says what is known of its blocks.

`shared` is what all clients of a listener share: `buffers` that are used again, the `budget` of large requests, and
`busy_poll`, which keeps the loop awake for the next request. `sending` goes past the transport. `tls` makes the context of
encrypted sessions, `access` says who may have one.
"""
