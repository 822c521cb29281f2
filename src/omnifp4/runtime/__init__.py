"""Runs NVFP4 checkpoints in Transformers: packed modules, loading, progress. Nothing heavy is imported here."""
