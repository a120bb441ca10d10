"""Rounds that move rank while a link trains."""
