"""One module a target; each has a ``write`` and reads back what it wrote."""
