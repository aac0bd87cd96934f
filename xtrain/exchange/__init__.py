"""Specs and the configs of other programs: out, in, and where each value comes from."""
