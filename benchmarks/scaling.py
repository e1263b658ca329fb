"""How time to the first step, memory and the cost of a step grow with rows, sample length, images per sample and processes.

Every line has a slope: the exponent of a power law, fitted to the logarithms, beside the largest that the work explains. Times of
steps and batches are processor time, so other load on the machine changes them little; the time to the first step is wall clock.

- rows: the built-in model trains three steps on 10^3 to 10^6 rows of a JSON Lines file, indexed.
- token plan: all rows are counted; then again with the cache, where only the times of the image files are read.
- length, images: steps of the 60-million model of the peers' fixture, on text alone and on images with a short answer.
- batches: the order and the batches of one process of many, for an epoch of a million rows. Nothing is launched.
- processes: the built-in model under torchrun. The processes share the cores of the machine.
- features: the weights hash of the feature cache, by the size of a tower.

Usage: python benchmarks/scaling.py [--parts rows plan length images batches processes features] [--most 1000000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

from data_million_rows import write_rows  # noqa: E402
from PIL import Image  # noqa: E402

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))
CHILD = """
from mmtune.utils.torchvision_support import prepare_torchvision
prepare_torchvision()
import sys
from pathlib import Path
from step_record import record_steps
from mmtune.cli.main import entry_point
record_steps(Path(sys.argv[2]))
sys.exit(entry_point(["train", sys.argv[1]]))
"""


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent b of values = a * sizes ** b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def report(name: str, unit: str, sizes: Sequence[float], values: Sequence[float], expected: str) -> None:
    measured = "  ".join(f"{size:,.0f}: {value:.3g}" for size, value in zip(sizes, values, strict=True))
    print(f"{name}: slope {slope(sizes, values):+.2f}, expected {expected}\n    {unit}: {measured}", flush=True)


def train(folder: Path, data: dict[str, Any], processes: int = 1, **changes: Any) -> dict[str, float]:
    """Seconds until the first step ends, peak memory in MB, tokens of a row, and processor seconds of a step after the first."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 1, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    out = folder / f"run{time.time_ns()}"
    recipe = {"data": {"train": [data]}, "train": settings, "output_dir": str(out), **changes}
    path, record = out.with_suffix(".json"), out.with_suffix(".steps")
    path.write_text(json.dumps(recipe))
    script = out.with_suffix(".py")
    script.write_text(CHILD)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(script), str(path), str(record)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PEERS)}
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    # Every process records its steps; lines of several are mixed.
    steps = [line for line in map(json.loads, record.read_text().splitlines()) if "step" in line]
    first = [line for line in steps if line["step"] == 1]
    last = [line for line in steps if line["step"] == settings["max_steps"]]
    return {
        "first": min(line["time"] for line in first) - start,
        "peak": json.loads((out / "summary.json").read_text())["peak_memory_mb"],
        "tokens": steps[-1]["tokens"] / steps[-1]["samples"],
        "step": (last[0]["processor"] - first[0]["processor"]) / (settings["max_steps"] - 1),
    }


def powers(first: int, most: int) -> list[int]:
    return [10**power for power in range(first, 12) if 10**power <= most]


def small_rows(folder: Path, count: int) -> dict[str, Any]:
    for number in range(64):
        if not (folder / f"{number}.png").exists():
            pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    path = folder / f"{count}.jsonl"
    write_rows(path, count)
    return {"path": str(path), "template": "llava", "media_root": str(folder)}


BUILTIN = {"model": {"base": "builtin:tiny-llava"}}


def rows(folder: Path, most: int) -> None:
    sizes = powers(3, most)
    results = [train(folder, small_rows(folder, size), **BUILTIN) for size in sizes]
    report("time to the first step by rows", "s", sizes, [each["first"] for each in results], "at most 1: rows are indexed")
    report("peak memory by rows", "MB", sizes, [each["peak"] for each in results], "about 0: 8 bytes of a row")
    report("a step by rows", "core s", sizes, [each["step"] for each in results], "0")


def plan(folder: Path, most: int) -> None:
    from mmtune.data.dataset import IndexedSamples
    from mmtune.models.load import resolve_model
    from mmtune.planning.token_plan import plan_section
    from mmtune.recipe.recipe import DataSection, ModelSection

    processor = resolve_model(ModelSection(base="builtin:tiny-llava")).processor
    sizes = powers(3, min(most, 100_000))
    sections = [DataSection(train=[small_rows(folder, size)], max_tokens=4096) for size in sizes]
    for name, expected in (("token plan by rows", "1"), ("token plan from the cache by rows", "at most 1")):
        seconds = [
            _seconds(lambda section=section: plan_section(IndexedSamples(section.train), section, processor))
            for section in sections
        ]
        report(name, "s", sizes, seconds, expected)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _fixture(folder: Path) -> dict[str, Any]:
    import fixture

    if not (folder / "60m").exists():
        fixture.write_model(folder / "60m", "60m")
    return {"model": {"base": str(folder / "60m")}, "tune": {"projector": "frozen"}}


def _written(folder: Path, name: str, row: dict[str, Any]) -> dict[str, Any]:
    (folder / f"{name}.json").write_text(json.dumps([{**row, "id": str(number)} for number in range(3)]))
    return {"path": str(folder / f"{name}.json"), "template": "llava"}


def length(folder: Path, _: int) -> None:
    model = _fixture(folder)

    def row(words: int) -> dict[str, Any]:
        answer = " ".join(["bakelu"] * words)
        return {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]}

    results = [train(folder, _written(folder, f"w{words}", row(words)), **model) for words in (64, 128, 256, 512)]
    tokens = [each["tokens"] for each in results]
    report(
        "a step by tokens of a row", "core s", tokens, [each["step"] for each in results], "1 to 2: linear layers, and attention"
    )
    report("peak memory by tokens of a row", "MB", tokens, [each["peak"] for each in results], "at most 1")


def images(folder: Path, _: int) -> None:
    import fixture

    model, counts = _fixture(folder), (1, 2, 4)
    for number in range(max(counts)):
        fixture.draw_image(folder / f"p{number}.jpg", np.random.default_rng(number))

    def row(count: int) -> dict[str, Any]:
        turns = [{"from": "human", "value": "<image>\n" * count + "?"}, {"from": "gpt", "value": "yes"}]
        return {"image": [f"p{number}.jpg" for number in range(count)], "conversations": turns}

    results = [train(folder, _written(folder, f"i{count}", row(count)), **model) for count in counts]
    expected = "1 to 2: the tower, and attention of the language model"
    report("a step by images of a row", "core s", counts, [each["step"] for each in results], expected)
    report("peak memory by images of a row", "MB", counts, [each["peak"] for each in results], "at most 1")


def batches(_: Path, most: int) -> None:
    from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler

    count, worlds = min(most, 1_000_000), (1, 8, 64, 512)
    lengths = np.random.default_rng(0).integers(50, 2000, count)

    def first_batch(world: int, **settings: Any) -> float:
        def run() -> None:
            sampler = MixtureBatchSampler(
                Mixture.by_repeats([count], [1.0]), seed=0, size=4, accumulation=1, rank=world - 1, world_size=world, **settings
            )
            next(iter(sampler))

        return _seconds(run)

    report("first batch of a rank by processes", "s", worlds, [first_batch(world) for world in worlds], "0")
    tokens = [first_batch(world, lengths=lengths, tokens=16_384) for world in worlds]
    report("first batch by tokens of a rank by processes", "s", worlds, tokens, "0: every rank makes all batches")
    sizes = powers(4, most)
    by_rows = []
    for size in sizes:
        count, lengths = size, np.random.default_rng(0).integers(50, 2000, size)
        by_rows.append(first_batch(8, lengths=lengths, tokens=16_384))
    report("first batch by tokens by rows", "s", sizes, by_rows, "1, and a little for sorting: every row has a place")


def processes(folder: Path, _: int) -> None:
    data, counts = small_rows(folder, 1000), (1, 2, 4)
    results = [train(folder, data, count, **BUILTIN) for count in counts]
    cores = len(os.sched_getaffinity(0))
    expected = f"0 with a core for each; they share {cores}"
    report("time to the first step by processes", "s", counts, [each["first"] for each in results], expected)
    report("peak memory of the main process by processes", "MB", counts, [each["peak"] for each in results], "0")


def features(_: Path, __: int) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from mmtune.models.towers.vision_towers import VisionTowers

    weights, seconds = [], []
    for layers in (6, 12, 24):
        vision = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12)
        text = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=99)
        towers = VisionTowers(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)))
        weights.append(sum(parameter.numel() for parameter in towers.modules[0].parameters()))
        seconds.append(_seconds(towers.weights_digest))
    report("hash of a tower by weights", "s", weights, seconds, "1")


PARTS: dict[str, Callable[[Path, int], None]] = {
    part.__name__: part for part in (rows, plan, length, images, batches, processes, features)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--most", type=int, default=1_000_000, help="the largest number of rows")
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {versions}", flush=True)
    for name in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder), arguments.most)


if __name__ == "__main__":
    main()
