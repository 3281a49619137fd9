"""The graph-rewriting library of fxshare."""
