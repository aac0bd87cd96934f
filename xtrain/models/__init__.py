"""Models: the GPT-2 family built in, anything else through `factory:`."""
