"""How this program writes files: whole or not at all, and never in place of something that is no file."""
