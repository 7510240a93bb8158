//! A complete NBD server as a library.
