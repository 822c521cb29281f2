"""Trains the tiny omni model that ships with omnifp4: stock Transformers classes, open data, one GPU, minutes."""
