"""Updates that are more than torch's own: each an optimizer whose whole memory is in its state."""
