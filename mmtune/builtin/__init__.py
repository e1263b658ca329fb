"""Data and models in the package: scenes of handwritten digits, and a tiny checkpoint."""

from pathlib import Path

TINY_LLAVA = Path(__file__).parent / "tiny_llava"
"""The directory of the checkpoint `builtin:tiny-llava`."""
