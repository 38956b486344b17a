"""Evaluation: the perplexity job, and what to hold its number against."""
