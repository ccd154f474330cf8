"""Measuring robustness: attacks and corruptions on [0, 1] pixels, their metrics, and evaluate() for all of them."""

from fastnull.robustness.attacks import apgd, autoattack, cw_l2, fgsm, mi_fgsm, patch_attack, pgd
from fastnull.robustness.corruptions import CORRUPTIONS, DEMO_CORRUPTIONS, corrupt
from fastnull.robustness.evaluate import evaluate
from fastnull.robustness.metrics import Accuracy, mean_corruption_accuracy, mean_corruption_error
from fastnull.robustness.settings import EvaluationSettings
from fastnull.robustness.table import format_published, format_table

__all__ = [
    "CORRUPTIONS",
    "DEMO_CORRUPTIONS",
    "Accuracy",
    "EvaluationSettings",
    "apgd",
    "autoattack",
    "corrupt",
    "cw_l2",
    "evaluate",
    "fgsm",
    "format_published",
    "format_table",
    "mean_corruption_accuracy",
    "mean_corruption_error",
    "mi_fgsm",
    "patch_attack",
    "pgd",
]
