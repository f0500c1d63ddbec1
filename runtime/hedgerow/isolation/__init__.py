"""Models in processes of their own: `session` is what an engine sees, `child` what runs in the process."""
