"""Run folders: everything a training leaves on disk."""
