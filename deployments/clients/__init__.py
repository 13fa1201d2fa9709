"""The parts of the Python client; import it from :mod:`deployments.client`."""
