"""Training: the loop, tasks, the run's folder, and the ranks that take part."""
