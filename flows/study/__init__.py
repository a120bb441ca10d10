"""`cola study`: the grid as Prefect task runs on a pool of processes that run the pipeline's stages."""
