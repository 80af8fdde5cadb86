"""What a run needs besides data and detector: features, caches, checkpoints, processes, loggers."""
