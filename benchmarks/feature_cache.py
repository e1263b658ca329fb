"""Training from cached features of a frozen vision tower (`data.cache_features`) beside training that runs the tower.

Two towers with random weights at 336 x 336 pixels, each before the same Llama of 30 million parameters: the 18-million one of the
peers' fixture, and CLIP-L (304 million). LoRA on the language model, fp32, one thread and one data-loader worker; JPEG files of
640 x 480 pixels. Processor time counts the worker too, from the first step of an epoch to its last.

Usage: python benchmarks/feature_cache.py [--rows 24] [--epochs 2] [--batch 4] [--towers 60m clip_l]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))


def write_inputs(folder: Path, towers: list[str], rows: int) -> None:
    import fixture

    fixture.SIZES["clip_l"] = fixture.Size((1024, 4096, 24, 16), fixture.SIZES["60m"].text)
    for tower in towers:
        fixture.write_model(folder / tower, tower)
    fixture.write_rows(folder / "rows", "image_heavy", rows)


def run(folder: Path, tower: str, name: str, arguments: argparse.Namespace, features: Path | None) -> list[dict[str, float]]:
    """Train, and return the recorded steps."""
    rows = {"path": str(folder / "rows" / "mmtune.json"), "template": "llava"}
    recipe = {
        "model": {"base": str(folder / tower)},
        "tune": {"projector": "frozen", "language": {"method": "lora", "r": 16, "lora_alpha": 32}},
        "data": {"train": [rows], **({} if features is None else {"cache_features": str(features)})},
        "train": {
            "num_train_epochs": arguments.epochs,
            "per_device_train_batch_size": arguments.batch,
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            "save_strategy": "no",
        },
        "output_dir": str(folder / f"{tower}_{name}"),
    }
    path = folder / f"{tower}_{name}.json"
    path.write_text(json.dumps(recipe))
    record = path.with_suffix(".steps")
    code = "from mmtune.utils.torchvision_support import prepare_torchvision; prepare_torchvision()\n"
    code += f"from step_record import record_steps; from pathlib import Path; record_steps(Path({str(record)!r}))\n"
    code += f"import sys; from mmtune.cli.main import entry_point; sys.exit(entry_point(['train', {str(path)!r}]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PEERS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return [line for line in map(json.loads, record.read_text().splitlines()) if "step" in line]


def rates(steps: list[dict[str, float]], epochs: int) -> list[float]:
    """Samples per core second of each epoch, without its first step."""
    size = len(steps) // epochs
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    return [sum(s["samples"] for s in part[1:]) / (part[-1]["processor"] - part[0]["processor"]) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--towers", nargs="+", default=["60m", "clip_l"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, arguments.towers, arguments.rows)
        print(f"{arguments.rows} rows with an image each, {arguments.epochs} epochs, batch {arguments.batch}")
        print(f"{'tower':8} {'run':22} {'samples per core second, by epoch':36} {'largest difference of a loss'}")
        for tower in arguments.towers:
            features = folder / f"features_{tower}"
            plain = run(folder, tower, "plain", arguments, None)
            for kind, steps in (
                ("without the cache", plain),
                ("empty cache", run(folder, tower, "first", arguments, features)),
                ("filled cache", run(folder, tower, "again", arguments, features)),
            ):
                by_epoch = "  ".join(f"{rate:.3f}" for rate in rates(steps, arguments.epochs))
                difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, plain, strict=True))
                print(f"{tower:8} {kind:22} {by_epoch:36} {difference:.1e}", flush=True)
            files = list(features.rglob("*.safetensors"))
            size = sum(file.stat().st_size for file in files) / len(files)
            images = list((folder / "rows" / "images").iterdir())
            jpeg = sum(file.stat().st_size for file in images) / len(images)
            print(f"{tower:8} {len(files)} files of {size / 1e6:.2f} MB for each image; its JPEG file has {jpeg / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
