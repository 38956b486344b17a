"""Training: the objective, the optimisers, the sharded step, the fit loop and its checkpoints."""
