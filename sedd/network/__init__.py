"""The concrete score network: a diffusion transformer, and its edge to the mathematics."""
