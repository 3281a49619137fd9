"""The result: a rewritten module, its record, its report."""
