//! The project's tasks: set-up, tests, benchmarks.

fn main() {}
