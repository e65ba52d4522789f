"""The server process: its files, start, watch and stop."""
