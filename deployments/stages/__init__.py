"""The deployments that work on a request, one thin file each, and what they share: handles, references, credits."""
