"""What a verification found: data, table, page."""
