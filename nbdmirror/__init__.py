"""nbdmirror: serve a disk over NBD and mirror it to another host while it is in use.

The map, from the top; a package may import what stands below it, never above, and packages on one line are strangers:

    cli                  the command line: one file per noun
    daemon               the composition root of `serve`: builds everything, signals, shutdown order
    config               the configuration file
    heartbeat            watchdog, status, more time to end: for the service manager
    disks                the disks that are served, from one reload to the next
    serving              what `serve` was asked for, and what follows from it: sockets, TLS, access
    commands             QMP verbs: look up, call one method, shape the answer
    metrics              what Prometheus is told; beside commands
    state                the state directory: which bitmaps outlive the daemon, and of which disks
    inventory            nodes, exports and jobs by name
    mirror server qmp    the mirror job; the NBD server; a QMP server that knows nothing of disks
    jobs devices         job status machine; block devices: file, memory, NBD, and the tracking filter
    bitmap protocol      dirty bitmaps, their files and the rules of a copy; the NBD wire, without I/O
    launch systemd       background, pid file, parent; passed sockets and sd_notify
    extents sockets      what block status says of a range; sockets that are listened on
    units                sizes and rates
    errors               the exception tree
"""

__version__ = "0.1.0"
