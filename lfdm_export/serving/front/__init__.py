"""What clients talk to: it speaks Triton's protocol over HTTP and gRPC, and hands on what it has checked.

Triton itself listens on a socket in a private folder alone. Its HTTP is off: a request in JSON is read here, and handed
on over gRPC.
"""
