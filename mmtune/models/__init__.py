"""Models: loading, assembly, components, quantization and generation."""
