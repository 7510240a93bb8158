//! TLS and messages on a socket.
