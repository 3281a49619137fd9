"""The composition: ``fxshare.compile`` and ``fxshare.plan``, the stages one after the other."""
