"""The mathematics of chains of low-rank adapters: torch, transformers and datasets; nothing of Prefect, MLflow or DVC."""
