"""Predictions of a model: generated, sampled, or the most likely candidate; the cache of answers."""
