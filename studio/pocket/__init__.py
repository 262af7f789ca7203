"""The embedded world and its models."""
