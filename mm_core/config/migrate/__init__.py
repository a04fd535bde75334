"""Rewriting a foreign job (a launch script, flags, a combined YAML, single files) into one commented `job.yaml`."""

from mm_core.config.migrate.migration import Migration, migrate

__all__ = ["Migration", "migrate"]
