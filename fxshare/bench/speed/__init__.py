"""``fxshare bench run``: measured speed of a compiled model beside the dense one."""
