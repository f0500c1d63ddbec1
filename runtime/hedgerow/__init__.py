"""Hedgerow's inference runtime: everything that answers a request."""

__version__ = "0.1.0"
