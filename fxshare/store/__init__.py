"""Folders of compiled models: :func:`save` and :func:`load`.

A folder holds tensors and data, never code. Loading builds the graph again: from the structure of
the original model, the configuration and the plan, by the same front end and the same passes, on
tensors without values; then the saved tensors are put in. Nothing is unpickled, and nothing that is
only named in the folder is imported. docs/reference/folder.md describes every file.
"""
