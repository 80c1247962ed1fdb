"""Effects of quantization: fidelity to full precision, distance to the data, and cost."""

from stepquant.evaluation.compare import Evaluation, EvaluationResult, evaluate

__all__ = ["Evaluation", "EvaluationResult", "evaluate"]
