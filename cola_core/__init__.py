"""The mathematics of chains of low-rank adapters: torch and transformers; nothing of Prefect, MLflow or DVC."""
