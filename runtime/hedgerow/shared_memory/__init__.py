"""Tensors in memory that callers on this machine share with the server."""
