"""From a request to stored results: planning, the store, and the work itself."""
