"""Training: the objective, the optimisers, the sharded step, the training loop and its checkpoints."""
