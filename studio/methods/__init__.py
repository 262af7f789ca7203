"""Model-agnostic methods, one file each."""
