"""The page of ``lfdm-web``: a form in the browser, over the engines of this process or a server's."""
