"""A running app from Python: one interface, over HTTP and over handles, for threads and for event loops.

Import from :mod:`deployments.client`, which says how.
"""
