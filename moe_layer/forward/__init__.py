"""A forward behind the router: choose replicas, dispatch, schedule, GEMMs, combine."""
