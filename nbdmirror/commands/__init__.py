"""QMP commands, thin: look up in the inventory, call one method, shape the answer.

One class per subject, with a `register` that names its handlers; a handler's signature is its command's schema. Names, defaults
and error texts are QEMU's (its QMP reference manual), so that scripts written for QEMU work; what QMP lacks begins with `x-`.
"""
