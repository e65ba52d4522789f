"""A video API over HTTP, in the shape in which programs talk to other video servers: ``/v1/videos``."""
