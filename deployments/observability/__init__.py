"""Metrics of the whole cluster, and log lines of a request's way through the stages."""
