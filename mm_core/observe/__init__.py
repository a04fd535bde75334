"""What a run shows: console, metrics, profiles."""
