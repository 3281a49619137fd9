"""Models by name, and saved folders: what was saved is compiled again and filled."""
