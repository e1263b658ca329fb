"""Requests to a served model, several at a time, compared with the trained model's answers and with one request at a time.

The built-in model is served by `mmtune serve`'s engine. Every question of the digits' held-out rows is asked alone, then all are
asked `--at-once` at a time. Printed are lost requests, answers that differ from the model's own (and how many of these have two
largest logits that differ by less than 1e-4), and requests per second.

Usage: python benchmarks/serving_requests.py [--requests 200] [--at-once 16] [--engine transformers] [--engine-command COMMAND]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402

from mmtune.builtin.digits import write_digits  # noqa: E402
from mmtune.data.dataset import IndexedSamples, iterate_rows  # noqa: E402
from mmtune.data.message import Sample, prompt_messages  # noqa: E402
from mmtune.evaluation.predictions.answering import generate_predictions  # noqa: E402
from mmtune.evaluation.predictions.decoding import DecodingSettings  # noqa: E402
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint  # noqa: E402
from mmtune.models.load import load_base, resolve_model  # noqa: E402
from mmtune.recipe.recipe import ModelSection, Source  # noqa: E402
from mmtune.serving.engine_client import EngineClient  # noqa: E402
from mmtune.serving.engine_process import free_port, running_engine  # noqa: E402
from mmtune.serving.engines import find_engine  # noqa: E402

TOKENS = 20


def ask_all(engine: EngineClient, samples: Sequence[Sample], at_once: int) -> tuple[list[str], float]:
    """The answers in the order of the samples, and the seconds they took. A request that fails raises its error."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        answers = list(threads.map(lambda sample: engine.ask(prompt_messages(sample), TOKENS).text.strip(), samples))
    return answers, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--engine-command")
    arguments = parser.parse_args()
    model, processor = load_base(resolve_model(ModelSection(base="builtin:tiny-llava")), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder), ("eval",))
        source = Source(path=f"{folder}/eval.json", template="llava", limit=arguments.requests)
        samples = list(iterate_rows(IndexedSamples([source])))
        predictions = generate_predictions(model.eval(), processor, samples, DecodingSettings(TOKENS), batch_size=1)
        save_checkpoint(model, processor, Path(folder) / "model")
        port, engine = free_port(), find_engine(arguments.engine)
        command = engine.command(f"{folder}/model", port, (), arguments.engine_command)
        with running_engine(command, engine.environment, port) as process:
            process.wait_until_ready(600.0)
            client = EngineClient(process.address, f"{folder}/model")
            client.connect()
            alone, seconds_alone = ask_all(client, samples, 1)
            together, seconds_together = ask_all(client, samples, arguments.at_once)
    print(
        f"{arguments.engine}, built-in model, fp32, {platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {len(samples)} questions about images"
    )
    for name, answers, seconds in (
        ("one at a time", alone, seconds_alone),
        (f"{arguments.at_once} at a time", together, seconds_together),
    ):
        differing = [p for p, answer in zip(predictions, answers, strict=True) if p.text.strip() != answer]
        near_ties = sum(prediction.near_tie for prediction in differing)
        print(
            f"{name}: {len(samples) - len(answers)} lost, {len(answers) - len(differing)} answers are the model's own, "
            f"{len(differing)} differ ({near_ties} near ties); {seconds:.1f} s, {len(answers) / seconds:.1f} requests/s"
        )
    print(f"requests per second at once / alone: {seconds_alone / seconds_together:.2f}")


if __name__ == "__main__":
    main()
