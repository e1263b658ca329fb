"""Fold an adapter into its base, and prove from disk that the result is what was trained."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.data.dataset import Samples
from mmtune.data.message import Sample
from mmtune.errors import CheckFailed, UserError
from mmtune.model.load import DTYPES, base_of_adapter
from mmtune.recipe import Recipe, load_recipe
from mmtune.release.card import model_card
from mmtune.release.parity import Observed, largest_difference, observe, same_answers
from mmtune.run_directory import RunDirectory, replaced_directory

TOLERANCE = {"fp32": 1e-4, "bf16": 0.5}
"""Largest logit difference allowed between adapter and merged model. In fp32 it is the rounding of one matrix sum against
two. A bf16 weight keeps 8 bits, so folding an update in rounds it to within 1 part in 256 of the weight it lands on."""


@dataclass(frozen=True)
class Parity:
    """How the merged model compares with the adapter, and with the base it must not equal."""

    merge_samples: int
    merge_max_logit_difference: float
    merge_same_answers: int
    merge_difference_from_base: float
    merge_tolerance: float


def merge(path: Path, out: Path, *, overwrite: bool = False, count: int = 32) -> Parity:
    """Write the merged model of a run to `out`.

    The base is loaded unquantized, the adapter folded in, the result written beside `out`, loaded back from disk, and
    compared with the adapter on up to `count` samples of the recipe's held-out data (of its training data when it
    evaluates nothing). `out` takes its name last.

    Args:
        path: a run directory that holds an adapter.
        out: where the merged model goes.
        overwrite: replace an existing `out`, which stays whole until the new one is proven.
        count: samples to compare on.

    Returns:
        The figures, which also go into the run's `summary.json` and the model card.

    Raises:
        UserError: no adapter in the run, a damaged adapter, a missing base, an existing `out`.
        CheckFailed: the merged model differs from the adapter, or equals the base; nothing is left at `out`.
    """
    run = RunDirectory(path)
    if run.model.is_dir():
        raise UserError(f"{path} trained the whole model, so there is no adapter to merge: {run.model} is the checkpoint")
    if not (run.adapter / "adapter_config.json").is_file():
        raise UserError(f"{path} is not a finished run: it has no {run.adapter.name}/adapter_config.json")
    if count < 1:
        raise UserError(f"--samples {count}: a merge is compared on at least one sample")
    recipe = load_recipe(run.recipe)
    samples = parity_samples(recipe, count)
    new_tokens = recipe.evaluate.max_new_tokens if recipe.evaluate else 64
    dtype = DTYPES[recipe.model.precision]

    with replaced_directory(out, overwrite) as temporary:
        processor = AutoProcessor.from_pretrained(str(run.adapter))
        model = _load_adapter(run, dtype)
        adapter = observe(model, processor, samples, new_tokens)
        with model.disable_adapter():
            base = observe(model, processor, samples[:1], 1)
        merged = model.merge_and_unload()
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        del model, merged
        gc.collect()

        reloaded = AutoModelForImageTextToText.from_pretrained(str(temporary), dtype=dtype)
        result = observe(reloaded, AutoProcessor.from_pretrained(str(temporary)), samples, new_tokens)
        parity = _compare(adapter, base, result, TOLERANCE[recipe.model.precision])
        _enforce(parity)
        summary = run.update_summary(asdict(parity)) if run.summary.is_file() else asdict(parity)
        (temporary / "README.md").write_text(model_card(recipe, summary, run), encoding="utf-8")
    return parity


def parity_samples(recipe: Recipe, count: int) -> list[Sample]:
    """Up to `count` samples spread over the recipe's held-out data, or over its training data when it has none."""
    samples = Samples(recipe.evaluate.data if recipe.evaluate else recipe.data.train)
    count = min(count, len(samples))
    return [samples[number * len(samples) // count] for number in range(count)]


def _load_adapter(run: RunDirectory, dtype: torch.dtype) -> PeftModel:
    base = base_of_adapter(run.adapter)
    try:
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{run.adapter}: cannot load its base {base}: {error}") from error
    try:
        return PeftModel.from_pretrained(model, str(run.adapter))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{run.adapter}: cannot load the adapter: {error}") from error


def _compare(adapter: Observed, base: Observed, merged: Observed, tolerance: float) -> Parity:
    first = Observed(merged.logits[:1], merged.answers[:1])
    return Parity(
        merge_samples=len(merged.answers),
        merge_max_logit_difference=largest_difference(adapter, merged),
        merge_same_answers=same_answers(adapter, merged),
        merge_difference_from_base=largest_difference(base, first),
        merge_tolerance=tolerance,
    )


def _enforce(parity: Parity) -> None:
    if parity.merge_difference_from_base <= parity.merge_tolerance / 100:
        raise CheckFailed("the merged model equals the base: the adapter changed nothing, or was not folded in")
    if parity.merge_max_logit_difference > parity.merge_tolerance:
        raise CheckFailed(
            f"the merged model differs from the adapter: largest logit difference {parity.merge_max_logit_difference:.3g}, "
            f"more than {parity.merge_tolerance:g}"
        )
    if parity.merge_tolerance < 1e-2 and parity.merge_same_answers < parity.merge_samples:
        raise CheckFailed(
            f"the merged model answers {parity.merge_samples - parity.merge_same_answers} of {parity.merge_samples} samples "
            "unlike the adapter"
        )
