"""Fold an adapter into its base, and prove from disk that the result is what was trained."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mmtune.data.dataset import Samples
from mmtune.data.message import Sample
from mmtune.errors import CheckFailed, UserError
from mmtune.files import replaced_directory
from mmtune.model.checkpoint import CHECKPOINT_MARK
from mmtune.model.compute import place
from mmtune.model.load import ADAPTER_CONFIG, DTYPES, base_of_adapter, load_trained
from mmtune.recipe import Recipe, load_recipe, needed_paths
from mmtune.release.card import model_card
from mmtune.release.parity import Observed, answer_logits, compare, observe, same_answers
from mmtune.run_directory import RunDirectory

TOLERANCE = 1e-4
"""Largest logit difference in fp32 between adapter and folded model: the rounding of one matrix sum against two."""

ROUNDING = 0.5
"""How much a release of half precision may be changed by its rounding, as a part of what the adapter changed (means of absolute
logit differences). A model that loses more than half of its tuning to rounding is another model."""


@dataclass(frozen=True)
class Parity:
    """How the merged model, loaded back from disk and run in fp32, compares with the adapter on its fp32 base.

    Attributes:
        merge_samples: on how many.
        merge_dtype: of the released weights.
        merge_max_logit_difference, merge_mean_logit_difference, merge_kl: see `parity.Difference`.
        merge_same_answers: greedy answers that are the same text.
        merge_fold_difference: the largest logit difference before rounding to `merge_dtype`.
        merge_tolerance: what `merge_fold_difference` may be.
        merge_difference_from_base: largest logit difference from the untuned base, which the merged model must not equal.
    """

    merge_samples: int
    merge_dtype: str
    merge_max_logit_difference: float
    merge_mean_logit_difference: float
    merge_kl: float
    merge_same_answers: int
    merge_fold_difference: float
    merge_tolerance: float
    merge_difference_from_base: float


def merge(path: Path, out: Path, *, overwrite: bool = False, count: int = 32) -> Parity:
    """Write the merged model of a run to `out`.

    The base is loaded unquantized in fp32, the adapter folded in, the result written beside `out` in the run's precision, loaded
    back from disk, and compared with the adapter on up to `count` samples of the recipe's held-out data (of its training
    data when it evaluates nothing). `out` takes its name last.

    Args:
        path: a run directory that holds an adapter.
        out: where the merged model goes.
        overwrite: replace an existing `out`, which stays whole until the new one is proven.
        count: samples to compare on.

    Returns:
        The figures, which also go into the run's `summary.json` and the model card.

    Raises:
        UserError: no adapter in the run, a damaged adapter, a missing base, an `out` that must not be replaced.
        CheckFailed: the merged model differs from the adapter, or equals the base; nothing is left at `out`.
    """
    run = RunDirectory(path)
    if run.model.is_dir():
        raise UserError(f"{path} trained the whole model, so there is no adapter to merge: {run.model} is the checkpoint")
    if not (run.adapter / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} is not a finished run: it has no {run.adapter.name}/{ADAPTER_CONFIG}")
    if count < 1:
        raise UserError(f"--samples {count}: a merge is compared on at least one sample")
    recipe = load_recipe(run.recipe)
    samples = parity_samples(recipe, count)
    new_tokens = recipe.evaluate.max_new_tokens if recipe.evaluate else 64
    needed = [path, Path(base_of_adapter(run.adapter)), *needed_paths(recipe)]

    with replaced_directory(out, overwrite, CHECKPOINT_MARK, needed) as fresh:
        model, processor = load_trained(path, torch.float32)
        place(model)
        adapter = observe(model, processor, samples, new_tokens)
        with model.disable_adapter():
            base = answer_logits(model, processor, samples)
        merged = model.merge_and_unload()
        folded = observe(merged, processor, samples, new_tokens)
        _enforce_fold(adapter, base, folded)
        merged.to(DTYPES[recipe.model.precision]).save_pretrained(fresh)
        processor.save_pretrained(fresh)
        del model, merged
        gc.collect()

        result = observe(*load_trained(fresh, torch.float32), samples, new_tokens)
        difference = compare(adapter.logits, result.logits)
        parity = Parity(
            merge_samples=len(samples),
            merge_dtype=recipe.model.precision,
            merge_max_logit_difference=difference.largest,
            merge_mean_logit_difference=difference.mean,
            merge_kl=difference.kl,
            merge_same_answers=same_answers(adapter, result),
            merge_fold_difference=compare(adapter.logits, folded.logits).largest,
            merge_tolerance=TOLERANCE,
            merge_difference_from_base=compare(base, result.logits).largest,
        )
        _enforce_release(parity, change=compare(base, adapter.logits).mean)
        summary = {**(run.read_summary() if run.summary.is_file() else {}), **asdict(parity)}
        (fresh / "README.md").write_text(model_card(recipe, summary, run), encoding="utf-8")
    if run.summary.is_file():
        run.update_summary(asdict(parity))
    return parity


def parity_samples(recipe: Recipe, count: int) -> list[Sample]:
    """Up to `count` samples spread over the recipe's held-out data, or over its training data when it has none."""
    samples = Samples(recipe.evaluate.data if recipe.evaluate else recipe.data.train)
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _enforce_fold(adapter: Observed, base: list[torch.Tensor], folded: Observed) -> None:
    if compare(base, folded.logits).largest <= TOLERANCE / 100:
        raise CheckFailed("the merged model equals the base: the adapter changed nothing, or was not folded in")
    apart = compare(adapter.logits, folded.logits).largest
    if apart > TOLERANCE:
        raise CheckFailed(
            f"the merged model differs from the adapter: largest logit difference {apart:.3g}, more than {TOLERANCE:g}"
        )
    if (same := same_answers(adapter, folded)) < len(adapter.answers):
        raise CheckFailed(
            f"the merged model answers {len(adapter.answers) - same} of {len(adapter.answers)} samples unlike the adapter"
        )


def _enforce_release(parity: Parity, change: float) -> None:
    exact = parity.merge_dtype == "fp32"
    apart, allowed = parity.merge_mean_logit_difference, ROUNDING * change
    if exact and (parity.merge_max_logit_difference > TOLERANCE or parity.merge_same_answers < parity.merge_samples):
        raise CheckFailed(
            f"the merged model, loaded back from disk, differs from the adapter: largest logit difference "
            f"{parity.merge_max_logit_difference:.3g}, {parity.merge_same_answers} of {parity.merge_samples} answers the same"
        )
    if not exact and apart > allowed:
        raise CheckFailed(
            f"rounding the merged model to {parity.merge_dtype} changes its logits by {apart:.3g} on average, more than "
            f"{allowed:.3g}, half of what the adapter changed"
        )
