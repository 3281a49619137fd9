"""The planner: which slices share a basis, at which rank, and what stays dense.

Pure: numpy and networkx, neither torch nor weights. A candidate is anything with slices, a curve of
loss against cost, and a kind that says how it is realised; the shared basis is the first kind.
"""
