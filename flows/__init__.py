"""Prefect, DVC and the command line: when, where and how often the stages run."""
