"""What runs under every room: paths and folders, several processes, streams, JAX's settings. Imports no other room."""
