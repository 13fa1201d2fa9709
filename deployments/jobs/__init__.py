"""Durable jobs: accepted requests in a database, claimed and run by whichever Director has room for them."""
