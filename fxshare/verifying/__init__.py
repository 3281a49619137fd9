"""Is the rewritten model what it says it is? Comparison with the original."""
