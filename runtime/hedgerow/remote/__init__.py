"""Other servers as a backend: `backend` is the whole, `pool` its endpoints, `connection` the way to one of them."""
