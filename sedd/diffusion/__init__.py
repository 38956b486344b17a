"""The mathematics of score-entropy discrete diffusion: pure functions, independent of any network and any data."""
