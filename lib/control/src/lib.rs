//! The local HTTP and JSON API on a Unix socket, and its client.
