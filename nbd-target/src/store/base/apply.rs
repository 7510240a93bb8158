//! Applying blocks.
