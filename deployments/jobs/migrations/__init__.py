"""The database's schema, release by release: each file of ``versions`` leads from the one before it to its own."""
