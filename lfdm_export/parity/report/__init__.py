"""The report of a verification: data, table, page."""
