"""The code of a registered model: MLflow copies this file beside the model and runs it wherever the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from pandas import DataFrame


class ServedChain(PythonModel):
    """Raw rows in, one column `prediction` out; cola_core travels with the model."""

    def load_context(self, context: Any) -> None:
        """Find the base, tie the links into it and keep the predictor."""
        from cola_core.predict import Predictor

        self.predictor = Predictor.load(Path(context.artifacts["chain"]))

    def predict(self, context: Any, model_input: DataFrame, params: dict[str, Any] | None = None) -> DataFrame:
        """Labels (or generated texts) of the rows, under the rows' own index."""
        rows = [{str(name): value for name, value in row.items()} for row in model_input.to_dict("records")]
        predictions = self.predictor.predict(rows)
        return DataFrame({"prediction": predictions}, index=model_input.index)


set_model(ServedChain())
