"""Reading and writing of files: a file is written completely or not at all, and only regular files are replaced."""
