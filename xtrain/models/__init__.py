"""Models: the GPT-2 family built in, the transformers library's by `hf:`, anything else by `factory:`."""
