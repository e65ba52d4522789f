"""What clients and the server share."""
