"""The deployments that work on a request, one thin file each, and their shared handles and streams."""
