"""How good a model is, as a device of a given budget would run it."""

from emberfed.evaluation.config import EvaluationConfig
from emberfed.evaluation.quality import evaluate
from emberfed.evaluation.scores import Score, Scores

__all__ = ["EvaluationConfig", "Score", "Scores", "evaluate"]
