"""Evaluation: likelihood bounds and their errors, baselines, and the quality of samples."""
