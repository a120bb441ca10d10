"""One file per DVC stage: path in, path out."""
