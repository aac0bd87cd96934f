"""Checkpoints: one portable format, written by xtrain alone, read by every engine."""
