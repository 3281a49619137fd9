"""A configuration from the model itself: ``fxshare.init`` and ``fxshare.propose``."""
