"""The Serve graph: ingress, Director and stages, and the ways in. No module here imports torch at its top."""
