"""How good the global model is, as a device of a given budget would run it."""

from emberfed.evaluation.quality import EvaluationConfig, Scores, evaluate

__all__ = ["EvaluationConfig", "Scores", "evaluate"]
