//! The target: keeps the ordered log and presents the disk as of any write.
