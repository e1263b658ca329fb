"""Options that the training scripts of all programs share, and what they do first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from step_record import record_steps

HERE = Path(__file__).resolve().parent
METHODS = ("lora", "full", "qlora")


def read_options() -> argparse.Namespace:
    """Parse the command line, and let the run record its steps. Called before the program imports transformers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="model_SIZE of fixture.py")
    parser.add_argument("--rows", type=Path, required=True, help="rows_VARIANT_COUNT of fixture.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--record", type=Path, required=True, help="file of the recorded steps")
    parser.add_argument("--method", choices=METHODS, default="lora", help="how the language model is tuned")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument(
        "--in-order", action="store_true", help="rows in the order of the file, so that losses compare step by step"
    )
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    for name in ("model", "rows", "output", "record"):
        setattr(options, name, getattr(options, name).resolve())

    sys.path.insert(0, str(HERE.parents[1]))
    from mmtune.utils.torchvision_support import prepare_torchvision  # needs the standard library alone

    prepare_torchvision()
    record_steps(options.record)
    return options
