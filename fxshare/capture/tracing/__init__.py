"""The fx front end: a tracer whose proxies carry the values they would have."""
