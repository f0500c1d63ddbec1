"""Models on this machine: `model_host` owns them, `loading` opens them, `batching` puts their requests together."""
