"""What quantization changed: against full precision, against the data, and in cost."""

from stepquant.evaluation.compare import Evaluation, EvaluationResult, evaluate

__all__ = ["Evaluation", "EvaluationResult", "evaluate"]
