"""The HTTP side: request bodies, error bodies, limits. Thin; what a request means is decided in ``cosmos3_core``."""
