"""Durable jobs: accepted requests in a database, claimed and run by any Director that has room for them."""
