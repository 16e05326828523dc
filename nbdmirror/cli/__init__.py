"""The command line: one file per noun.

`main` gathers the commands and turns errors into exit statuses; `serve`, `copy` and `compare` work by themselves, all others
talk to a running daemon over its control socket (`client`). `options` has what several share, `progress` the bars.
"""
