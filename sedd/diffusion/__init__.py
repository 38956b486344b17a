"""The mathematics of score-entropy discrete diffusion: pure functions, which know of no network and no data."""
