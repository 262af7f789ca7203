"""Files of other libraries: read and write, each gated on equal outputs."""
