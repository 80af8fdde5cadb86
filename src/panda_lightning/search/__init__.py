"""Nearest neighbours, and the choice of what to search among."""
