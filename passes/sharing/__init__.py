"""Passes that rewrite linears into slices over shared bases."""
