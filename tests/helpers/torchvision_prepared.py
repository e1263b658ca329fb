"""Imported by scripts before anything that imports transformers, as the command line and conftest.py prepare it."""

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()
