"""Text and tokens: from files to batches."""
