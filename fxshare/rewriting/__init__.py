"""From a captured graph and factors to the finished module, and its lowering."""
