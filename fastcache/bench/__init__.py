"""From a config to cells, from a cell to a row, from rows to a table."""
