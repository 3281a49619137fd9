"""Every causal family of the installed transformers, built small and measured.

``sizes`` has the rules that make a configuration small and the exceptions to them, ``models``
builds the families, ``measure`` says what holds for one, and ``python -m tests.zoo.causal`` runs
them.
"""
