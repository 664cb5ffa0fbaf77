"""What the plugin puts into verl: an engine, and an order of rows that keeps groups together; see `adapters.verl`."""
