"""Scaling on paper: FLOPs and bytes by arithmetic alone; nothing here imports torch."""
