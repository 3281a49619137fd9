"""What compiling a model will take: memory, disk and time of every stage, before anything runs."""
