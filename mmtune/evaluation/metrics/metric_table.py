"""The table of metrics, read by the recipe's check, the evaluation, the reports and `mmtune score`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmtune.evaluation.metrics.entries.box_overlap import ACC_AT_IOU_HALF, IOU
from mmtune.evaluation.metrics.entries.caption_scores import BLEU, CIDER_D, ROUGE_L
from mmtune.evaluation.metrics.entries.circular_choice import CIRCULAR_CHOICE
from mmtune.evaluation.metrics.entries.closed_answers import CLASSIFICATION, MULTIPLE_CHOICE, YES_NO
from mmtune.evaluation.metrics.entries.edit_distance import ANLS, CER, WER
from mmtune.evaluation.metrics.entries.json_fields import JSON_FIELDS
from mmtune.evaluation.metrics.entries.mmmu import MMMU
from mmtune.evaluation.metrics.entries.numeric_answers import NUMERIC, RELAXED_ACCURACY
from mmtune.evaluation.metrics.entries.text_match import EXACT_MATCH, TOKEN_F1
from mmtune.evaluation.metrics.entries.vqa_accuracy import TEXTVQA_ACCURACY, VQA_ACCURACY
from mmtune.evaluation.metrics.function_metric import load_function_metric
from mmtune.evaluation.metrics.metric import Metric
from mmtune.utils.errors import RecipeValueError, UserError, nearest

_TABLE = (
    EXACT_MATCH,
    TOKEN_F1,
    VQA_ACCURACY,
    TEXTVQA_ACCURACY,
    ANLS,
    RELAXED_ACCURACY,
    MULTIPLE_CHOICE,
    CIRCULAR_CHOICE,
    MMMU,
    YES_NO,
    CLASSIFICATION,
    NUMERIC,
    CER,
    WER,
    CIDER_D,
    BLEU,
    ROUGE_L,
    IOU,
    ACC_AT_IOU_HALF,
    JSON_FIELDS,
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}
"""Every metric by its name."""

_OTHER_NAMES = {"accuracy": EXACT_MATCH, "acc": EXACT_MATCH, "em": EXACT_MATCH, "f1": TOKEN_F1, "mae": NUMERIC, "mean_iou": IOU}
"""Names that other tools use, and the metric of the table that is meant."""

DEFAULT_METRIC = EXACT_MATCH.name
"""The metric of rows whose data template names none, where the recipe names none."""


def metric_name(of_recipe: str | None, of_template: str | None) -> str:
    """The name of a source's metric: the recipe's, else the one of its data template, else exact match."""
    return of_recipe or of_template or DEFAULT_METRIC


def check_template_metric(template: str, metric: str | None) -> None:
    """Check that a data template names a metric of the table: a file of data must not name code to run.

    Raises:
        RecipeValueError: it does not.
    """
    if metric is not None and metric not in METRICS:
        raise RecipeValueError("template", f"{template}: unknown metric '{metric}'{name_hint(metric)}")


def is_held_out_loss(name: str) -> bool:
    """Whether the name of a held-out metric, without `eval_`, is `loss` or `loss_SOURCE`. A name with a colon is a function."""
    return name == "loss" or (name.startswith("loss_") and ":" not in name)


def find_metric(name: str) -> Metric:
    """The metric of a name, or the function of `module:function` or `FILE.py:function`.

    Raises:
        UserError: no such metric or function.
    """
    metric = recorded_metric(name)
    return metric if name in METRICS else load_function_metric(name)


def recorded_metric(name: str) -> Metric:
    """The metric of answers that have their scores. A function is not loaded, so that an answers file runs no code.

    Raises:
        UserError: an unknown metric; not a missing function.
    """
    if name in METRICS:
        return METRICS[name]
    if re.fullmatch(r"[^:]+:[A-Za-z_]\w*", name):
        return Metric(name, "", "", percent=False, has_baseline=False)
    file = name.partition(":")[0]
    if file.endswith(".py"):
        raise UserError(f"unknown metric '{name}'; a function in a file is FILE.py:function, such as '{file}:score'")
    hint = name_hint(name)
    own = "" if hint.endswith("?") else "; one of your own is FILE.py:function or module:function"
    raise UserError(f"unknown metric '{name}'{hint}{own}")


def name_hint(name: str) -> str:
    """A hint for an unknown metric: the one that is meant, or all names."""
    if name.lower() in _OTHER_NAMES:
        return f"; did you mean '{_OTHER_NAMES[name.lower()].name}'?"
    return nearest(name, METRICS)
