"""How the model runs on many processes and machines: gangs of rank actors, tensors between them, configs."""
