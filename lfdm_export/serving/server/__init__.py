"""The server process: its files, and how it is started, watched and stopped."""
