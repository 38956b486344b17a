"""Tokens and what diffuses instead of them: embeddings of a learned table."""
