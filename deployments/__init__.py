"""The Serve graph: ingress, Director and stages, with its clients and launcher. No module imports torch at its top."""
