"""``fxshare bench scale``: what compressing a model of some size costs, stage by stage."""
