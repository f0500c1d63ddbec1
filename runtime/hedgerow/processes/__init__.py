"""Several processes that serve on one port: who starts them, what they say to each other, what they have counted."""
