"""Diffusion of tokens by jump processes: the absorbing and the uniform process."""
