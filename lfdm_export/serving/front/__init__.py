"""The front that clients talk to: it speaks Triton's protocol over HTTP and gRPC, and forwards checked requests.

Triton itself listens only on a socket in a private folder. Its HTTP is off: the front parses JSON requests and forwards
them over gRPC.
"""
