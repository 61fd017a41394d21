"""From text to batches; the folders in here are prepared datasets."""
