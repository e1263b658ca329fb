"""The two tuners that PEFT lacks. Importing this makes PEFT know them."""

from mmtune.methods import bottleneck as bottleneck
from mmtune.methods import gated_prefix as gated_prefix
