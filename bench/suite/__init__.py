"""A suite: what a task file says, and the jobs that it is planned into."""
