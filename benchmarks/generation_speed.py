"""Time of batched answers compared with plain transformers' `generate`, one question at a time, on the built-in model.

Both encode the prompts, generate greedily and decode. Each pair of measurements runs one after the other; medians and the median
ratio are printed, and how many answers are the same. Candidates are compared with a forward pass of prompt and candidate each.

Usage: python benchmarks/generation_speed.py [--questions 512] [--pairs 5] [--tokens 32] [--batch 16 32 64] [--no-choices]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402

from mmtune.builtin.digits import write_digits  # noqa: E402
from mmtune.data.dataset import IndexedSamples, iterate_rows  # noqa: E402
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_choices, open_images  # noqa: E402
from mmtune.data.message import Sample, prompt_messages  # noqa: E402
from mmtune.evaluation.predictions.answering import generate_answers  # noqa: E402
from mmtune.evaluation.predictions.choices import score_choices  # noqa: E402
from mmtune.models.load import load_base, resolve_model  # noqa: E402
from mmtune.recipe.recipe import ModelSection, Source  # noqa: E402

CHOICES = ("yes", "no", "one", "two", "three", "four", "five", "six")


def plain_answers(model: Any, processor: Any, samples: list[Sample], tokens: int) -> list[str]:
    """One call of transformers' processor and `generate` for each question."""
    answers = []
    for sample in samples:
        messages = open_images(sample.id, prompt_messages(sample))
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers.append(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def plain_scores(model: Any, processor: Any, samples: list[Sample]) -> list[float]:
    """One forward pass of prompt and candidate for each candidate."""
    scores = []
    for sample in samples:
        for encoded in encode_choices(sample, processor):
            labels = encoded.pop("labels")[0, 1:]
            with torch.inference_mode():
                log_probabilities = model(**encoded).logits[0, :-1].log_softmax(-1)
            at = labels != IGNORE_INDEX
            scores.append(float(log_probabilities[at].gather(1, labels[at, None]).sum()))
    return scores


def compare(name: str, plain: Callable[[], list[Any]], ours: Callable[[], list[Any]], pairs: int) -> tuple[list[Any], list[Any]]:
    ours()
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    results = {}
    for _ in range(pairs):
        for kind, run in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            results[kind] = run()
            times[kind].append(time.perf_counter() - start)
    ratios = sorted(a / b for a, b in zip(times["plain"], times["ours"], strict=True))
    print(
        f"{name}: one by one {statistics.median(times['plain']):.2f} s, ours {statistics.median(times['ours']):.2f} s, "
        f"ratio {statistics.median(ratios):.1f} (median of {pairs} pairs, {ratios[0]:.1f} to {ratios[-1]:.1f})",
        flush=True,
    )
    return results["plain"], results["ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--no-choices", dest="choices", action="store_false", help="leave out the log-likelihoods of candidates")
    arguments = parser.parse_args()
    model, processor = load_base(resolve_model(ModelSection(base="builtin:tiny-llava")), seed=0)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder), ("eval",))
        source = Source(path=f"{folder}/eval.json", template="llava", limit=arguments.questions)
        samples = list(iterate_rows(IndexedSamples([source])))
        print(
            f"built-in model, fp32, {torch.get_num_threads()} thread(s) of {platform.processor() or platform.machine()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}; {len(samples)} questions about images"
        )
        for size in arguments.batch:
            expected, answers = compare(
                f"answers of at most {arguments.tokens} tokens, batch_size {size}",
                lambda: plain_answers(model, processor, samples, arguments.tokens),
                lambda size=size: generate_answers(model, processor, samples, arguments.tokens, size),
                arguments.pairs,
            )
            print(f"  the same answers: {sum(a == b for a, b in zip(expected, answers, strict=True))} of {len(samples)}")
        if not arguments.choices:
            return
        questions = [replace(sample, choices=CHOICES) for sample in samples]
        expected, scores = compare(
            f"log-likelihoods of {len(CHOICES)} candidates each, batch_size 64",
            lambda: plain_scores(model, processor, questions),
            lambda: [score for each in score_choices(model, processor, questions, 64) for score in each],
            arguments.pairs,
        )
        print(f"  largest difference: {max(abs(a - b) for a, b in zip(expected, scores, strict=True)):.1e}")


if __name__ == "__main__":
    main()
