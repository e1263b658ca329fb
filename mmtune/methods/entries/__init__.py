"""Entries of the method table that have code: one file for each method, or for a few that share it."""
