"""fxshare: a torch.fx graph-rewriting compiler for cross-layer basis sharing."""
