"""What papers write as formulas: losses, metrics, the Fisher diagonal."""
