"""Block devices: one interface, stacked wrappers.

`base` says what a device can do; `file`, `memory` and `nbd` are disks; `tracked` is the filter that tells observers of
every write; `open` turns what a user typed into a device.
"""
