"""Metrics for Prometheus: `collector` has the names and where the numbers come from, `endpoint` the HTTP.

Imported only where metrics are asked for: the client library takes 0.06 s, which a daemon without metrics need not wait for.
"""
