//! The streaming path's sockets and files, on tokio-uring.
