"""The two tuners that PEFT lacks. Importing this makes PEFT know them."""

from mmtune.methods.tuners import bottleneck_tuner as bottleneck_tuner
from mmtune.methods.tuners import gated_prefix_tuner as gated_prefix_tuner
