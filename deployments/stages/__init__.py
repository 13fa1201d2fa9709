"""The deployments that do a request's work, one thin file each, and what they share: handles, references, credits."""
