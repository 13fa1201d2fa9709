"""Files of jobs while they grow and after: the store, its archive, and variants of finished files."""
