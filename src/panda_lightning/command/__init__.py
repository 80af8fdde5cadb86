"""What the commands `lightning` and `panda` share: arguments, words, checkpoints, and how they end."""
