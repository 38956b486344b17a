"""The concrete score network: a diffusion transformer, and its conversions to denoisers and score statistics."""
