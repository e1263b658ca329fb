"""What ships inside the package: the digit scenes, and a tiny checkpoint."""

from pathlib import Path

TINY_LLAVA = Path(__file__).parent / "tiny_llava"
"""The checkpoint `builtin:tiny-llava`."""
