"""Models on this machine: `model_host` owns them, `batching` puts their requests together, `workers` runs them."""
