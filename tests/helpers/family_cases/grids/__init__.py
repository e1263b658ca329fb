"""Families whose image is a grid of patches, by developer."""
