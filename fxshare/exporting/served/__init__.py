"""The folder that transformers and vLLM load: what stands in it, and how it is checked."""
