"""Gaussian diffusion: noisy latents of tokens, their reversal and bounds."""
