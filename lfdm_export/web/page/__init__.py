"""The page of ``lfdm-web``: a form in the browser that uses the engines of this process or of a server."""
