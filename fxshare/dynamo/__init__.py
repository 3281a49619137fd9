"""A compiled model as a backend of ``torch.compile``, for who keeps the original object."""
