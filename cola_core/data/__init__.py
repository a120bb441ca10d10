"""From a user's file to token ids: read, render, split, encode."""
