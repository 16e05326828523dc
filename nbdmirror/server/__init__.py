"""The NBD server: `listener` accepts, `session` joins a socket to the protocol core, `export` answers from a disk, `contexts`
says what is known of its blocks.

`tls` makes the context of encrypted sessions, `access` says who may have one.
"""
