"""Tuning methods: the table of them all, and the two tuners that PEFT lacks (`mmtune.methods.tuners`)."""
