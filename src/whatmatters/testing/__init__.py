"""What a user's own scorer, plan or method must keep, and tiny models to try it on. Needs nothing that only our tests have."""
