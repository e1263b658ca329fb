"""Time of the split by image and of the leakage search over 10,000 different JPEG photographs with two rows each.

The pictures are generated as in data_header_scan.py and are in the page cache. They are 50 pictures that differ in a corner, so
that each held-out one is a near-duplicate.

Usage: OMP_NUM_THREADS=1 python benchmarks/leakage.py [--images 10000] [--size 640x480] > benchmarks/results/leakage.txt
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
from data_header_scan import make_picture, processor
from PIL import Image

from mmtune.recipe.recipe import Source
from mmtune.utils.threads import usable_cores
from mmtune.utils.torchvision_support import prepare_torchvision


def write(folder: Path, count: int, size: tuple[int, int]) -> Source:
    """Two rows for each image; every image is one of 50 pictures with other corner pixels, and so other bytes."""
    pictures = [np.array(make_picture(size, seed)) for seed in range(50)]
    rows = []
    for number in range(count):
        pixels = pictures[number % 50]
        pixels[:16, :16] = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        for question in ("What is it?", "Where is it?"):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "here"}]
            rows.append({"image": f"{number}.jpg", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(folder / "rows.jsonl"), template="llava", held_out=0.1)


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    print(f"{what:58}{time.perf_counter() - began:8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", default="640x480")
    arguments = parser.parse_args()
    prepare_torchvision()
    from mmtune.data.dataset import IndexedSamples
    from mmtune.data.validation.validate import Validator

    width, _, height = arguments.size.partition("x")
    print(f"{processor()}, {usable_cores()} cores, Python {platform.python_version()}, Pillow {PIL.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder), arguments.images, (int(width), int(height)))
        sizes = [path.stat().st_size for path in Path(folder).glob("*.jpg")]
        print(f"{len(sizes):,} JPEG of {arguments.size}, {statistics.mean(sizes) / 1e3:.0f} kB each on average")
        with timed("split of all rows by image"):
            IndexedSamples([source])
        with timed("the same from the cache"):
            held_out = len(IndexedSamples([source.held_out_part()]))
        plain = source.model_copy(update={"held_out": None})
        with timed("data check of the rows without held-out rows"):
            list(Validator([plain]).issues())
        with timed("data check with leakage and near-duplicates"):
            issues = list(Validator([source], [source.held_out_part()]).issues())
        kinds = sorted({issue.issue for issue in issues})
        print(f"{held_out:,} held-out rows; issues: {len(issues):,} {', '.join(kinds)}")


if __name__ == "__main__":
    main()
