"""Tables of clips to make: read, shared out, made, and finished after whatever ends a run."""
