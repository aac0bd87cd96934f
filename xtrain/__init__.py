"""xtrain: one strict YAML spec for training transformers, the same training on every backend."""

__version__ = "0.1.0"
