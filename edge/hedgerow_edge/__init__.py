"""The device: what it does besides answering requests."""
