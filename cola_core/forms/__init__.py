"""Parametrisations that are more than A and B: gates, shortcuts between layers, random bases."""
