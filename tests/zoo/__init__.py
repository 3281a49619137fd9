"""Tiny random models of every architecture that fxshare claims to work on, and what proves it.

``families`` makes the models, ``written`` has those that no library ships, ``measure`` tries
everything on one of them, and ``python -m tests.zoo.support`` writes ``docs/reference/support.md``.
``causal`` does less for many more: every causal family of the installed transformers.
"""
