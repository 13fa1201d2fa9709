"""From a command line to an app that answers, and back to nothing: Ray, Serve, the graph, a check of it."""
