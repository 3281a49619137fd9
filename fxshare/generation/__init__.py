"""``generate()`` on a rewritten graph.

The graph of a plain call has no key-value cache. For generation the model is captured once more,
with a warm cache as an input, and the same passes are applied; the second graph runs on the
*modules of the first*, so nothing is stored twice, and what is trained, cast or replaced in the one
is so in the other. It is made at the first call that needs it, from the structure of the original
(:class:`Structure`, which holds no values), and checked against the plain graph. The generation
loop is that of the model's own transformers class (:mod:`fxshare.generation.shell`).

Where a call cannot be captured, the model's own code runs it, with the weights of the graph
(:mod:`fxshare.generation.module_form`), and the record says so.
"""
