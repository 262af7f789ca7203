"""Pages of the studio, on the public Python API only."""
