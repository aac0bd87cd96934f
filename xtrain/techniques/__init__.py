"""Memory techniques that work on any module, whatever the engine; what needs one engine is in backends/."""
