"""The model on many processes and machines: gangs of rank actors, tensors between them, configs."""
