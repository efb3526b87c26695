"""The chain of stages, from a configuration to a validated circuit."""
