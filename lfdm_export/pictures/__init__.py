"""Pictures and clips: reading, preprocessing, display and files."""
