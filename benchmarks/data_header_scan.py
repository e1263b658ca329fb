"""Time to read an image's size and orientation from its header, compared with decoding the file with Pillow.

The images are generated, half JPEG and half PNG, with smooth areas, edges and noise, so that they compress about as photographs
do. Every round reads all headers and then decodes all files; the files are in the page cache in both cases.

Usage: python benchmarks/data_header_scan.py [--images 300] [--size 1600x1200] [--rounds 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from mmtune.data.media.media import image_size

DISTINCT = 20  # different images per format; the others are copies


def make_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colours, an edge and noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(np.int16) + rng.normal(0, 4, (height, width, 1)).astype(np.int16)
    pixels[:, width // 3 : width // 2] //= 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_files(folder: Path, count: int, size: tuple[int, int]) -> dict[str, list[Path]]:
    """The files by format; a quarter have an EXIF orientation that rotates them."""
    exif = Image.Exif()
    files: dict[str, list[Path]] = {"JPEG": [], "PNG": []}
    for number in range(count // 2):
        for kind, paths in files.items():
            path = folder / f"{number}.{kind.lower()}"
            if number < DISTINCT:
                exif[0x0112] = 6 if number % 4 == 0 else 1
                options = {"quality": 90} if kind == "JPEG" else {"compress_level": 6}
                make_picture(size, number).save(path, kind, exif=exif, **options)
            else:
                path.write_bytes(paths[number % DISTINCT].read_bytes())
            paths.append(path)
    return files


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("RGB")


def seconds(read: Callable[[Path], object], paths: list[Path]) -> float:
    began = time.perf_counter()
    for path in paths:
        read(path)
    return time.perf_counter() - began


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--size", default="1600x1200")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    width, _, height = arguments.size.partition("x")
    print(f"{processor()}, Python {platform.python_version()}, Pillow {PIL.__version__}, numpy {np.__version__}; one thread")
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), arguments.images, (int(width), int(height)))
        for kind, paths in files.items():
            sizes = [path.stat().st_size for path in paths]
            print(f"{len(paths)} {kind} of {width} x {height}, {statistics.mean(sizes) / 1e6:.2f} MB each on average")
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in files}
        for _ in range(arguments.rounds):
            for kind, paths in files.items():
                times[kind].append((seconds(image_size, paths), seconds(decode, paths)))
    print(f"\n{'':8}{'header':>14}{'decoded':>14}{'ratio':>8}   (median of {arguments.rounds} rounds, per image)")
    totals = [0.0, 0.0]
    for kind, rounds in times.items():
        header, decoded = (statistics.median(column) for column in zip(*rounds, strict=True))
        totals = [totals[0] + header, totals[1] + decoded]
        each = len(files[kind])
        print(f"{kind:8}{header / each * 1e3:11.3f} ms{decoded / each * 1e3:11.3f} ms{decoded / header:8.0f}")
    each = sum(map(len, files.values()))
    print(f"{'both':8}{totals[0] / each * 1e3:11.3f} ms{totals[1] / each * 1e3:11.3f} ms{totals[1] / totals[0]:8.0f}")


if __name__ == "__main__":
    main()
