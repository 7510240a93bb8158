//! The mutual-TLS link between agent, relay and target, and the tokio-uring seam.
