"""Reading and writing graphs: linears, operands, lookups, slices, origins, writes."""
