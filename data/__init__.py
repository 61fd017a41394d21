"""Tokenizers, datasets and their preparation. Each folder in here is a prepared dataset."""
