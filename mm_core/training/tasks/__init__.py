"""Tasks: what turns a batch into a loss."""
