"""The core of Graft Studio. It knows no modality."""
