"""Backends, one folder each. Nobody imports one: xtrain.registry looks them up by entry point."""
