"""Planning: which slices share a basis, at which rank, and what stays dense."""
