"""Paths, folders, several processes, output streams, JAX's settings. Imports `sedd.errors` and `sedd.version` only."""
