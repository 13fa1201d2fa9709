"""The Director: admission of requests, the pipeline of a request through the stages, retries, the runner of jobs."""
