"""The centre: fleet, publishing, learning, large models, and the command line."""
